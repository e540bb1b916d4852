// The page: what is chosen (sample, map, way of looking) and what follows from it. The last of the scripts.

const report = JSON.parse(document.getElementById("data").textContent);
for (const entry of report.samples)
  for (const map of entry.maps) map.baseline.src = entry.baselines[map.baseline.image] ?? null;
const tip = document.getElementById("tip");
const state = { sample: -1, map: 0, mode: "heat", opacity: 0.7, fraction: 0.1, probe: null, timer: 0 };
let page = {}; // the elements of the sample on show, by data-ref

// ---------------------------------------------------------------- the image and its map

const sample = () => report.samples[state.sample];
const current = () => sample().maps[state.map];
const shown = () => sample().images[current().image];

async function drawView() {
  const at = `${state.sample}.${state.map}`,
    map = current(),
    shape = shown();
  if (!shape || (!shape.src && !map.values)) return;
  const image = await loadImage(shape.src);
  if (at !== `${state.sample}.${state.map}`) return; // another map was chosen meanwhile
  paint(page.view, image, map, { mode: state.mode, opacity: state.opacity, long: 1080 }, shape);
  if (shape.seen) hatch(page.view, shape.seen);
  Object.assign(page.view.dataset, { map: state.map, mode: state.mode, opacity: state.opacity });
  placeBox();
}

/** The box, or the point, that the answer says, over the image. */
function placeBox() {
  const { box } = current();
  page.stated.hidden = !box;
  if (!box) return;
  const [left, top, right, bottom] = box.map((share) => Math.min(1, Math.max(0, share)));
  const { offsetLeft, offsetTop, clientWidth, clientHeight } = page.view;
  page.stated.classList.toggle("point", box[0] === box[2]);
  Object.assign(page.stated.style, {
    left: `${offsetLeft + left * clientWidth}px`,
    top: `${offsetTop + top * clientHeight}px`,
    width: `${(right - left) * clientWidth}px`,
    height: `${(bottom - top) * clientHeight}px`,
  });
}

function drawBar() {
  const context = page.bar.getContext("2d"),
    { width, height } = page.bar;
  for (let x = 0; x < width; x++) {
    const value = x / (width - 1),
      colour = COLOURS[Math.round(value * 255)],
      alpha = veil(value);
    context.fillStyle = `rgb(${colour.map((c) => Math.round(168 + alpha * (c - 168))).join(" ")})`;
    context.fillRect(x, 0, 1, height);
  }
}

/** Says the value under a point of the image; x and y are fractions of its sides. */
function read(x, y) {
  const map = current(),
    shape = shown();
  state.probe = [clamp(x), clamp(y)];
  if (!map.values) return;
  const { w, h } = map.values,
    values = cells(map),
    fx = clamp(state.probe[0] * w - 0.5, 0, w - 1),
    fy = clamp(state.probe[1] * h - 0.5, 0, h - 1);
  const left = Math.floor(fx),
    top = Math.floor(fy),
    right = Math.min(left + 1, w - 1),
    bottom = Math.min(top + 1, h - 1),
    tx = fx - left,
    ty = fy - top;
  const value =
    (values[top * w + left] * (1 - tx) + values[top * w + right] * tx) * (1 - ty) +
    (values[bottom * w + left] * (1 - tx) + values[bottom * w + right] * tx) * ty;
  const below = values.reduce((n, v) => n + (v < value), 0) / values.length;
  const place = shape.w
    ? ` · pixel ${Math.floor(state.probe[0] * (shape.w - 1e-6))}, ${Math.floor(state.probe[1] * (shape.h - 1e-6))}`
    : "";
  page.readout.textContent = `Importance ${value.toFixed(2)} · more than ${Math.round(100 * below)} % of the image${place}${hidden(shape, ...state.probe) ? " · never seen by the model" : ""}`;
  page.cross.hidden = false;
  page.cross.style.left = `${page.view.offsetLeft + state.probe[0] * page.view.clientWidth}px`;
  page.cross.style.top = `${page.view.offsetTop + state.probe[1] * page.view.clientHeight}px`;
}

/** Whether the model never sees this point; x and y are fractions of the image's sides. */
function hidden(shape, x, y) {
  if (!shape?.seen) return false;
  const { w, h } = shape.seen;
  return !seenCells(shape.seen)[Math.min(h - 1, Math.floor(y * h)) * w + Math.min(w - 1, Math.floor(x * w))];
}

function seenCells(seen) {
  // packed bits, the first cell in the highest
  if (!seen.cells) {
    const bytes = atob(seen.data);
    seen.cells = Uint8Array.from(
      { length: seen.w * seen.h },
      (_, i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1,
    );
  }
  return seen.cells;
}

function watchView() {
  const at = (event) => {
    const box = page.view.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  page.view.addEventListener("pointermove", (event) => read(...at(event)));
  page.view.addEventListener("pointerdown", (event) => read(...at(event)));
  page.view.addEventListener("pointerleave", () => {
    page.cross.hidden = true;
    page.readout.textContent = page.readout.dataset.idle;
  });
  page.view.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [x, y] = state.probe ?? [0.5, 0.5];
    read(x + move[0] * 0.025, y + move[1] * 0.025);
  });
}

function chooseMode(mode) {
  state.mode = mode;
  for (const button of page.modes.children) button.setAttribute("aria-pressed", button.dataset.mode === mode);
  page.opacity.disabled = mode === "image";
  page.barbox.hidden = mode !== "heat";
  nextFrame(drawView);
}

// ---------------------------------------------------------------- choosing

function chooseMap(index) {
  stop();
  state.map = clamp(index, 0, sample().maps.length - 1);
  const map = current(),
    shape = shown(),
    drawable = Boolean(map.values);
  page.nothing.hidden = drawable || Boolean(shape?.src);
  page.nothing.textContent = map.reason;
  page.view.hidden = !(drawable || shape?.src);
  page.tools.hidden = page.scale.hidden = !drawable;
  page.unseen.hidden = !shape?.seen;
  page.trial.hidden = !drawable || (!map.score && !map.baseline.src);
  page.pair.hidden = !(drawable && map.baseline.src && shape?.src);
  page.trialtext.hidden = !map.score;
  page.watched.textContent = map.score?.own ? `“${map.score.own}”` : "the probability of the explained words";
  page.cross.hidden = true;
  page.readout.dataset.idle = drawable
    ? shape?.src
      ? "Point at the image, or use the arrow keys on it, to read values."
      : "The image itself is not in this page: it was written without the trace."
    : "";
  page.readout.textContent = page.readout.dataset.idle;
  page.view.setAttribute("aria-label", drawable ? `Image with the importance map of ${map.label}` : "The image");
  for (const [i, button] of [...page.maps.children].entries()) button.setAttribute("aria-pressed", i === state.map);
  const dotted = sample().maps.some((other) => !other.whole && other.values);
  page.hint.replaceChildren(
    !map.whole
      ? `“${sample().maps[0].label}”, or Escape, leads back.`
      : dotted
        ? "Words with a dot have a map of their own: click one."
        : "",
  );
  markWords();
  drawStrip();
  drawVerdict();
  drawChart();
  drawCards();
  drawProvenance();
  if (!drawable) state.mode = state.mode === "image" ? "heat" : state.mode;
  chooseMode(state.mode);
  drawTrial();
  try {
    history.replaceState(null, "", `#${state.sample + 1}${state.map ? `.${state.map + 1}` : ""}`);
  } catch {
    /* an address that may not be changed */
  }
}

function chooseSample(index, map = 0) {
  stop();
  hideTip();
  state.sample = clamp(index, 0, report.samples.length - 1);
  state.map = 0;
  state.probe = null;
  const fresh = document.getElementById("sample-template").content.cloneNode(true);
  page = Object.fromEntries([...fresh.querySelectorAll("[data-ref]")].map((element) => [element.dataset.ref, element]));
  document.getElementById("sample").replaceChildren(fresh);
  page.asked.textContent = sample().asked;
  page.question.textContent = sample().question || "(not known: the page was written without the trace)";
  page.maps.replaceChildren(
    ...sample().maps.map((entry, i) => {
      const button = make("button", { type: "button", className: "quiet", textContent: entry.label });
      button.addEventListener("click", () => chooseMap(i));
      return button;
    }),
  );
  page.maps.parentElement.hidden = sample().maps.length < 2;
  for (const note of sample().notes) page.lead.after(make("p", { className: "lead", textContent: note }));
  for (const button of page.modes.children) button.addEventListener("click", () => chooseMode(button.dataset.mode));
  page.opacity.value = 100 * state.opacity;
  page.opacity.addEventListener("input", () => {
    state.opacity = page.opacity.value / 100;
    nextFrame(drawView);
  });
  page.fraction.addEventListener("input", () => {
    stop();
    chooseFraction(page.fraction.value / 100);
  });
  page.play.addEventListener("click", play);
  page.copy.addEventListener("click", copy);
  page.save.addEventListener("click", () =>
    make("a", { href: marked().toDataURL("image/png"), download: `${sample().id || "heatmap"}.png` }).click(),
  );
  const evidence = document.getElementById(`evidence-${state.sample}`);
  if (evidence) page.evidence.replaceChildren(evidence.content.cloneNode(true));
  for (const frame of page.evidence.querySelectorAll("[data-tokens]")) {
    const [start, stop] = frame.dataset.tokens.split("-").map(Number);
    frame.addEventListener("click", () => {
      const inside = (map) => map.values && map.tokens.length && map.tokens.every((t) => start <= t && t < stop);
      chooseMap(sample().maps.findIndex(inside));
      page.view.scrollIntoView({ block: "center" });
    });
  }
  drawBar();
  drawAnswer();
  drawLead();
  drawTokens();
  drawSides();
  watchView();
  for (const [i, button] of [...document.querySelectorAll("#samples button")].entries()) {
    button.setAttribute("aria-current", i === state.sample);
    if (i === state.sample) button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  chooseMap(map);
}

/** Both sides of a contrast, and one against the other. */
function drawSides() {
  page.sides.hidden = !sample().sides.length;
  page.sides.replaceChildren(
    ...sample().sides.flatMap((side) => [
      make("h2", { textContent: side.title, dir: "auto" }),
      make("p", {
        className: "prose",
        textContent: `Two maps by ${side.method}: what in the image speaks for one, against the other, and the reverse. Each is drawn up to its own highest value, so the third says where, not by how much, one outweighs the other.`,
      }),
      make(
        "div",
        { className: "trio" },
        ...side.drawn.map(({ src, text }) =>
          make(
            "figure",
            {},
            make("img", { src, alt: text }),
            make("figcaption", { textContent: text, dir: "auto" }),
          ),
        ),
      ),
    ]),
  );
}

/** All images of the prompt: the one on show is marked, those that are explained can be chosen. */
function drawStrip() {
  const { strip, maps } = sample(),
    on = Number(current().image);
  page.strip.hidden = strip.length < 2;
  if (page.strip.hidden) return;
  const number = (i) => `Image ${i + 1} of ${strip.length}`;
  page.strip.replaceChildren(
    make("p", { className: "label", textContent: `${number(on)}: the one on show` }),
    ...strip.map((src, i) => {
      const map = maps.findIndex((one) => Number(one.image) === i);
      const image = make("img", { src, alt: map < 0 ? `${number(i)}, not explained` : number(i) });
      if (map < 0) return make("span", {}, image);
      const button = make("button", { type: "button", "aria-pressed": i === on }, image);
      button.addEventListener("click", () => {
        if (i === Number(current().image)) return;
        chooseMap(map);
        page.strip.querySelector("[aria-pressed=true]").focus();
      });
      return button;
    }),
  );
}

function drawSamples() {
  if (report.samples.length < 2) return;
  const nav = document.getElementById("samples");
  nav.hidden = false;
  document.body.classList.add("many");
  report.samples.forEach((entry, i) => {
    const map = entry.maps[0],
      canvas = make("canvas", { width: 112, height: 112 });
    const summary = map.score
      ? `del ${decimal(map.score.deletion)} · ins ${decimal(map.score.insertion)}`
      : map.verdict.title;
    const button = make(
      "button",
      { type: "button" },
      canvas,
      make(
        "span",
        {},
        make("b", { textContent: entry.answer || entry.question || `Sample ${i + 1}`, dir: "auto" }),
        make("small", {}, make("i", { className: `dot ${map.verdict.state}` }), summary),
      ),
    );
    button.addEventListener("click", () => {
      chooseSample(i);
      window.scrollTo({ top: 0 });
    });
    nav.append(button);
    const shape = entry.images[map.image];
    loadImage(shape?.thumb).then((image) => {
      // the middle square of the small image, with its heat
      if (!shape) return;
      const small = make("canvas");
      paint(
        small,
        image,
        { values: map.values },
        { mode: "heat", opacity: 0.75, long: (112 * Math.max(shape.w, shape.h)) / Math.min(shape.w, shape.h) },
        shape,
      );
      canvas.getContext("2d").drawImage(small, (112 - small.width) / 2, (112 - small.height) / 2);
    });
  });
}

/** What is shown, with the map's verdict in the corner: a map that is saved goes on without the page. */
function marked() {
  const copy = make("canvas", { width: page.view.width, height: page.view.height });
  const pen = copy.getContext("2d");
  pen.drawImage(page.view, 0, 0);
  const { state: found } = current().verdict;
  const [words, colour] = { trusted: ["holds up", "#0072b2"], doubted: ["do not trust", "#d55e00"] }[found] ?? [
    "not checked",
    "#5a5a5a",
  ];
  const size = Math.min(28, Math.max(10, Math.round(Math.min(copy.width, copy.height) / 28)));
  pen.font = `${size}px sans-serif`;
  const wide = pen.measureText(words).width + size;
  pen.fillStyle = colour;
  pen.fillRect(0, copy.height - 1.8 * size, wide, 1.8 * size);
  pen.fillStyle = "#ffffff";
  pen.textBaseline = "middle";
  pen.fillText(words, size / 2, copy.height - 0.9 * size);
  return copy;
}

// ---------------------------------------------------------------- start

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hideTip();
  const whole = sample().maps.findIndex((map) => map.whole);
  if (whole >= 0 && whole !== state.map) chooseMap(whole);
});
addEventListener("beforeprint", () =>
  document.querySelectorAll("details").forEach((element) => {
    element.open = true;
  }),
);
addEventListener("hashchange", fromAddress);
addEventListener("resize", () =>
  nextFrame(() => {
    drawChart();
    drawTrial();
    placeBox();
  }),
);

function fromAddress() {
  const [sampleNumber, mapNumber] = location.hash
    .slice(1)
    .split(".")
    .map((part) => parseInt(part, 10) || 1);
  if (sampleNumber - 1 !== state.sample || (mapNumber ?? 1) - 1 !== state.map)
    chooseSample((sampleNumber || 1) - 1, (mapNumber ?? 1) - 1);
}

drawSamples();
fromAddress();
document.documentElement.dataset.ready = "true";
