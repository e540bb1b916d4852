// The words of an answer over its image, in a notebook (anywidget). A click on a word sets `word`; the kernel, or the maps
// that are there already, say what is shown. Every string reaches the page as text, never as HTML.

function make(tag, fields, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}

function wash(llr) {
  // as on the report page: 6 nats and beyond is full colour
  if (llr === null || Math.abs(llr) < 0.05) return "";
  const strength = Math.min(1, Math.abs(llr) / 6) ** 0.65;
  return llr > 0
    ? `rgb(238 104 32 / ${(0.7 * strength).toFixed(3)})`
    : `rgb(58 110 210 / ${(0.62 * strength).toFixed(3)})`;
}

function render({ model, el }) {
  const picture = make("img", { alt: "" });
  const answer = make("p", { className: "answer" });
  const status = make("p", { className: "status" });
  status.setAttribute("role", "status");
  const question = make("p", { className: "question", textContent: model.get("question"), dir: "auto" });
  const root = make("div", { className: "lvlm-probe-widget" }, picture, make("div", {}, question, answer, status));

  const buttons = model.get("words").map((word, index) => {
    const button = make("button", { type: "button", textContent: word.text, title: word.told });
    button.style.background = wash(word.llr);
    button.addEventListener("click", () => {
      model.set("word", model.get("word") === index ? -1 : index);
      model.save_changes();
    });
    answer.append(word.before, button);
    return button;
  });
  answer.append(model.get("tail"));
  answer.dir = "auto"; // last: browsers look at the words that are there by then

  function draw() {
    const chosen = model.get("word"),
      maps = model.get("maps"),
      shown = maps[chosen] ?? (chosen < 0 ? maps[-1] : undefined);
    picture.hidden = !(shown ?? model.get("image"));
    picture.src = (shown ?? model.get("image")) || "";
    picture.alt = shown ? "The image under the map of what was explained" : "The image that the model was asked about";
    buttons.forEach((button, index) => {
      button.setAttribute("aria-pressed", index === chosen);
      button.classList.toggle("mapped", index in maps);
    });
    status.textContent = model.get("status");
  }
  const names = ["word", "maps", "status", "image"];
  for (const name of names) model.on(`change:${name}`, draw);
  draw();
  el.append(root);
  return () => names.forEach((name) => model.off(`change:${name}`, draw));
}

export default { render };
