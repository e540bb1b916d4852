// Page of a study: what stands in a cell, and its image. After draw.js; every string of the data becomes text.

const LONG = 320; // longest side of a drawn map, in pixels
const BLUE = [66, 133, 244];

/** Bytes of base64. */
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** Packed bits `{w, h, data}` as an array of 0 and 1. */
function bits(packed) {
  const source = bytes(packed.data);
  return Uint8Array.from({ length: packed.w * packed.h }, (_, i) => (source[i >> 3] >> (7 - (i & 7))) & 1);
}

/** The values of a map, 1 = its highest, as draw.js wants them. */
function readied(values) {
  const map = { values };
  map.cells = Float32Array.from(bytes(values.data), (value) => value / 255);
  map.peak = 1;
  return map;
}

/** Packed bits at drawing size, nearest neighbour. */
function spread(packed, width, height) {
  const source = bits(packed);
  const out = new Uint8Array(width * height);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      out[y * width + x] = source[Math.floor((y * packed.h) / height) * packed.w + Math.floor((x * packed.w) / width)];
  return out;
}

/** A line inside a region's border and one of another colour outside, so that one of them shows on any image. */
function rim(data, width, height, inside, inner, outer, thick = 1) {
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height && inside(y * width + x);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const own = inside(y * width + x);
      let border = false;
      for (let d = 1; d <= thick && !border; d++)
        border = at(x - d, y) !== own || at(x + d, y) !== own || at(x, y - d) !== own || at(x, y + d) !== own;
      if (!border || (own && !inner) || (!own && !outer)) continue;
      const colour = own ? inner : outer;
      for (let k = 0; k < 3; k++) data[4 * (y * width + x) + k] = colour[k];
    }
}

function stripes(data, width, height, seen) {
  const visible = spread(seen, width, height);
  for (let i = 0; i < visible.length; i++) {
    if (visible[i]) continue;
    const grey = 0.35 * (0.3 * data[4 * i] + 0.59 * data[4 * i + 1] + 0.11 * data[4 * i + 2]) + 0.65 * 150;
    const dark = ((i % width) + Math.floor(i / width)) % 9 < 2;
    for (let k = 0; k < 3; k++) data[4 * i + k] = dark ? 0.55 * grey : grey;
  }
}

/** Draws an image with a map over it. `map` and `region` may be missing. */
function drawMap(canvas, image, size, map, values, region, heat) {
  const shape = { w: size[0], h: size[1] };
  const ready = values && heat ? readied(values) : null;
  const context = canvas.getContext("2d", { willReadFrequently: true }); // the first request for a context decides
  paint(canvas, image, ready, { mode: "heat", opacity: 0.85, long: LONG }, shape);
  const { width, height } = canvas;
  const frame = context.getImageData(0, 0, width, height);
  if (map?.seen) stripes(frame.data, width, height, map.seen);
  if (ready && ready.cells.some((value) => value > 0)) {
    const stretched = field(ready, width, height);
    rim(frame.data, width, height, (i) => stretched[i] >= 0.5, [255, 255, 255], [30, 30, 30]);
  }
  if (region) {
    const changed = upscale(Float32Array.from(bits(region)), region.w, region.h, width, height);
    rim(frame.data, width, height, (i) => changed[i] >= 0.5, null, [255, 255, 255]);
    rim(frame.data, width, height, (i) => changed[i] >= 0.5, BLUE, null, 2);
  }
  context.putImageData(frame, 0, 0);
}

/** The class of a word's ground: 6 nats and beyond is full colour, as in the report. */
function wash(llr) {
  if (!known(llr) || Math.abs(llr) < 0.05) return "word";
  const step = Math.max(1, Math.round(5 * Math.min(1, Math.abs(llr) / 6) ** 0.65));
  return `word ${llr > 0 ? "with" : "against"}${step}`;
}

const ratio = (llr) => (known(llr) ? `LLR ${signed(llr)}` : "LLR not known");
const bare = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "");

/** The answer, its words to click on. `choose(word, place)` is called with what was clicked. */
function said(words, selected, choose) {
  const line = make("p", { className: "said" });
  if (!words) return line;
  const length = words.words.reduce((sum, [before, text]) => sum + before.length + text.length, 0);
  line.classList.toggle("long", length > 260);
  words.words.forEach(([before, text, llr], place) => {
    const button = pressable({ className: wash(llr), title: ratio(llr), "data-place": place }, () => choose(bare(text) || text, place));
    button.append(make("span", { className: selected.includes(place) ? "k" : "", textContent: text }));
    line.append(before, button);
  });
  line.append(words.tail || (words.words.length ? "" : "(an empty answer)"));
  line.dir = "auto"; // last: browsers look at the words that are there by then
  return line;
}

/** Question with what is new in it, and struck out what has gone; parts of `[text, kind]`. */
function differing(parts) {
  const line = make("p", { className: "question", dir: "auto" });
  for (const [text, kind] of parts) {
    if (kind === "same") line.append(text);
    else line.append(make(kind === "new" ? "ins" : "del", { textContent: text }));
  }
  return line;
}

function mark(correct) {
  if (correct === null || correct === undefined) return "";
  return make("span", {
    className: correct ? "mark right" : "mark wrong",
    textContent: correct ? "✓" : "✗",
    title: correct ? "right" : "wrong",
    role: "img",
    "aria-label": correct ? "right" : "wrong",
  });
}

/** Gain, deletion, insertion and verdict of a map. */
function scores(score, verdict) {
  const found = document.createDocumentFragment();
  if (known(score.deletion) && known(score.insertion)) {
    const gain = score.insertion - score.deletion;
    found.append(make("p", { className: "gain" }, make("b", { textContent: decimal(gain) }), "gain"));
    const [low, high] = [score.deletion, score.insertion].map((edge) => 100 * clamp(edge)).sort((a, b) => a - b);
    found.append(
      vector(
        "svg",
        { class: "span", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
        vector("rect", { class: "track", x: 0, y: 3, width: 100, height: 2 }),
        vector("rect", { class: gain >= 0 ? "reach" : "back", x: low, y: 1, width: Math.max(1, high - low), height: 6 }),
      ),
      make("p", { className: "pair", textContent: `del ${decimal(score.deletion)} · ins ${decimal(score.insertion)}` }),
    );
  } else if (score.trusted === false) {
    found.append(make("p", { className: "gain" }, make("b", { textContent: "–" }), "gain"));
    found.append(make("p", { className: "facts", textContent: "No score." }));
  } else found.append(make("p", { className: "facts", textContent: "Not judged." }));
  if (score.trusted === true)
    found.append(make("p", { className: "stands" }, make("i", { className: "dot trusted" }), "holds up"));
  else if (score.trusted === false) {
    const reasons = (verdict ?? "").replace(/^do not trust: /, "").split("; ").filter(Boolean);
    found.append(
      make(
        "details",
        {},
        make("summary", { className: "doubt" }, make("i", { className: "dot doubted" }), "do not trust"),
        make("ul", {}, ...reasons.map((reason) => make("li", { textContent: reason }))),
      ),
    );
  }
  return found;
}

const share = (value) => (known(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %` : "–");

/** What changed from the member that a variant is compared with, and whether its map follows. */
function changes(change, look, same, fooled, base) {
  const list = make("ul", { className: "changes" });
  const tell = (text, kind = "") => list.append(make("li", { textContent: text, className: kind }));
  if (same !== null && same !== undefined) {
    const judged = typeof fooled === "boolean"; // there is a true answer
    const alike = !judged ? "" : fooled ? ", though the true answer is another" : ", and so is the true one";
    const other = !judged || change.truth ? "" : ", though the true one is the same";
    if (same) tell(`the same answer as ${base}${alike}`, fooled ? "bad" : "");
    else tell(`another answer than ${base}${other}`, !judged ? "" : change.truth ? "good" : "bad");
  }
  if (change.region && look && known(look.mass) && known(look.area)) {
    const times = look.area > 0 ? look.mass / look.area : null;
    const lift = known(times) ? ` (${times.toFixed(1)} × its area)` : "";
    tell(`${share(look.mass)} of the map on the changed ${share(look.area)} of the image${lift}`, times >= 1.5 ? "good" : times < 1 ? "bad" : "");
    if (known(look.mass_before)) tell(`before the change ${share(look.mass_before)} of the map lay there`);
  } else if (change.image && change.reason) tell(change.reason);
  if (look && (known(look.rank_correlation) || known(look.top_iou)))
    tell(`maps of both: rank correlation ${decimal(look.rank_correlation)}, hottest fifth shared ${share(look.top_iou)}`);
  return list;
}
