// A brush over the image: which cells are painted goes to the server as a row of 0 and 1, at the end of each stroke.
const cells = props.value.cells;
const mask = new Uint8Array(cells * cells);
const reach = 0.045; // the brush's radius, as a share of the image's width
let last = null; // where the brush was, while it is down

function draw() {
  const canvas = element.querySelector("canvas");
  if (!canvas) return;
  canvas.width = canvas.height = cells;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "rgb(213, 94, 0)";
  mask.forEach((on, cell) => on && pen.fillRect(cell % cells, Math.floor(cell / cells), 1, 1));
}

function stroke(event) {
  const box = element.querySelector("canvas").getBoundingClientRect();
  const tall = box.height / box.width;
  const x = (event.clientX - box.left) / box.width;
  const y = ((event.clientY - box.top) / box.height) * tall;
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

element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS") return;
  event.preventDefault();
  event.target.setPointerCapture(event.pointerId);
  stroke(event);
});
element.addEventListener("pointermove", (event) => last && stroke(event));
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (last) trigger("input", { mask: mask.join("") });
    last = null;
  });
}
element.addEventListener("click", (event) => {
  if (!event.target.closest("[data-clear]")) return;
  mask.fill(0);
  draw();
  trigger("input", { mask: "" });
});
watch("value", () => {
  mask.fill(0);
  draw();
});
