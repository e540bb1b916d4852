// A brush over the image: which cells are painted goes to the server as a row of 0 and 1, at the end of each stroke.
// By pointer, or by keyboard: arrows move the brush, space paints where it is.
const cells = props.value.cells;
const mask = new Uint8Array(cells * cells);
const reach = 0.045; // the brush's radius, as a share of the image's width
let last = null; // where the brush was, while it is down
let keys = null; // where the keyboard has it
let telling = null;

function box() {
  const { left, top, width, height } = element.querySelector("canvas").getBoundingClientRect();
  return { left, top, width, tall: height / width };
}

function draw() {
  const canvas = element.querySelector("canvas");
  if (!canvas) return;
  canvas.width = canvas.height = cells;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "rgb(213, 94, 0)";
  mask.forEach((on, cell) => on && pen.fillRect(cell % cells, Math.floor(cell / cells), 1, 1));
  if (!keys) return;
  const { tall } = box();
  pen.strokeStyle = "#000";
  pen.beginPath();
  pen.ellipse(keys.x * cells, (keys.y / tall) * cells, reach * cells, (reach / tall) * cells, 0, 0, 2 * Math.PI);
  pen.stroke();
}

function stroke({ x, y }) { // in widths of the image
  const { tall } = box();
  const from = last ?? { x, y };
  const long = (x - from.x) ** 2 + (y - from.y) ** 2 || 1;
  for (let cell = 0; cell < mask.length; cell += 1) {
    const right = ((cell % cells) + 0.5) / cells - from.x;
    const down = ((Math.floor(cell / cells) + 0.5) / cells) * tall - from.y;
    const along = Math.min(1, Math.max(0, (right * (x - from.x) + down * (y - from.y)) / long));
    if (Math.hypot(right - along * (x - from.x), down - along * (y - from.y)) < reach) mask[cell] = 1;
  }
  last = { x, y };
  draw();
}

function tell(after = 0) {
  clearTimeout(telling);
  const now = () => trigger("input", { mask: mask.join("") });
  if (after) telling = setTimeout(now, after);
  else now();
}

function pointed(event) {
  const { left, top, width } = box();
  return { x: (event.clientX - left) / width, y: (event.clientY - top) / width };
}

element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS") return;
  event.preventDefault();
  event.target.setPointerCapture(event.pointerId);
  keys = null;
  stroke(pointed(event));
});
element.addEventListener("pointermove", (event) => last && stroke(pointed(event)));
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (last) tell();
    last = null;
  });
}
const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
element.addEventListener("keydown", (event) => {
  if (event.target.tagName !== "CANVAS" || !(event.key in steps)) return;
  event.preventDefault();
  const { tall } = box();
  const [right, down] = steps[event.key];
  const from = keys ?? { x: 0.5, y: tall / 2 };
  const within = (value, most) => Math.min(most, Math.max(0, value));
  keys = { x: within(from.x + right * reach, 1), y: within(from.y + down * reach, tall) };
  if (event.key !== " ") return draw();
  stroke(keys);
  last = null;
  tell(100); // once for keys that follow at once
});
element.addEventListener("focusout", () => {
  keys = null;
  draw();
});
element.addEventListener("click", (event) => {
  if (!event.target.closest("[data-clear]")) return;
  mask.fill(0);
  draw();
  tell();
});
watch("value", () => {
  mask.fill(0);
  draw();
});
