// A video: one frame large, moved through by the slider, the strip or play; with its heatmap or without. Of an answer
// with several heatmaps one is shown, chosen by a word or by its button.

const PACE = 600; // milliseconds for a frame

const clips = JSON.parse(document.getElementById("clips").textContent);
const halts = [];
for (const section of document.querySelectorAll(".panel")) {
  const { plain, at, across } = clips[Number(section.dataset.clip)];
  if (!plain.length) continue;
  const find = (name) => section.querySelector(name);
  const buttons = [...section.querySelectorAll(".frames button")];
  const heated = buttons.map((button) => button.querySelector("img").src);
  const [time, heat, play, large] = [find(".time"), find(".heat"), find(".play"), find(".large")];
  let timer = 0;

  const show = (frame) => {
    time.value = String(frame);
    time.setAttribute("aria-valuetext", at[frame]);
    find(".when").textContent = at[frame];
    large.src = heat.checked ? heated[frame] : plain[frame];
    large.alt = `Frame at ${at[frame]}${heat.checked ? " with the heatmap over it" : ""}`;
    buttons.forEach((button, place) => button.setAttribute("aria-current", String(place === frame)));
    const now = find(".curve .now");
    now.removeAttribute("hidden");
    now.setAttribute("x1", across[frame]);
    now.setAttribute("x2", across[frame]);
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };

  find(".player").hidden = false;
  time.addEventListener("input", () => show(Number(time.value)));
  heat.addEventListener("change", () => show(Number(time.value)));
  buttons.forEach((button, place) => button.addEventListener("click", () => (stop(), show(place))));
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "Pause";
    timer = setInterval(() => show((Number(time.value) + 1) % at.length), PACE);
  });
  halts.push(stop);
  show(Number(time.value));
}

for (const section of document.querySelectorAll("section.clip")) {
  const panels = [...section.querySelectorAll(".panel")];
  const choices = [...section.querySelectorAll(".choose button")];
  const words = [...section.querySelectorAll(".said .of")];
  if (panels.length < 2) continue;

  const choose = (number) => {
    halts.forEach((stop) => stop());
    panels.forEach((panel) => (panel.hidden = panel.dataset.clip !== number));
    choices.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.panel === number)));
    words.forEach((word) => word.setAttribute("aria-pressed", String(word.dataset.panels.split(" ").includes(number))));
  };
  choices.forEach((button) => button.addEventListener("click", () => choose(button.dataset.panel)));
  words.forEach((word) => word.addEventListener("click", () => choose(word.dataset.panels.split(" ")[0])));
  choose(panels[0].dataset.clip);
}

document.documentElement.dataset.ready = "true";
