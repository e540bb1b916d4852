"use strict";
// Heat, images and the small things that everything else uses. First of the
// scripts that are joined into the page's one: draw, answer, trial, theme, page.

// ---------------------------------------------------------------- small things

function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** What can be pressed and yet is a part of its line: a button is a block, whatever the direction of the words. */
function pressable(props, action) {
  const element = make("span", { role: "button", tabIndex: 0, ...props });
  element.addEventListener("click", action);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    action();
  });
  return element;
}

function vector(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const clamp = (x, low = 0, high = 1) => Math.min(high, Math.max(low, x));
const smooth = (x, low, high) => {
  const t = clamp((x - low) / (high - low));
  return t * t * (3 - 2 * t);
};
const known = (x) => typeof x === "number" && Number.isFinite(x);
const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const decimal = (x) => (known(x) ? x.toFixed(2).replace("-", "−") : "–");

function percent(p) {
  if (!known(p)) return "–";
  if (p > 0 && p < 0.001) return "< 0.1 %";
  const digits = (p > 0 && p < 0.1) || (p > 0.99 && p < 1) ? 1 : 0;
  return `${(100 * p).toFixed(digits).replace(/\.0$/, "")} %`;
}

function times(nats) {
  const ratio = Math.exp(Math.abs(nats));
  if (ratio < 1.1) return "about as likely either way";
  const amount = ratio >= 1e4 ? "over 10,000" : ratio >= 10 ? Math.round(ratio).toLocaleString("en") : ratio.toFixed(1);
  return `${amount}× ${nats > 0 ? "likelier with the image" : "likelier without the image"}`;
}

const nextFrame = (() => {
  // at most one drawing a frame
  let waiting = null;
  return (draw) => {
    if (!waiting)
      requestAnimationFrame(() => {
        const run = waiting;
        waiting = null;
        run();
      });
    waiting = draw;
  };
})();

// ---------------------------------------------------------------- heat

const STOPS = [
  [10, 8, 38],
  [58, 12, 108],
  [128, 28, 110],
  [190, 48, 84],
  [232, 92, 46],
  [250, 158, 24],
  [249, 216, 84],
  [255, 252, 190],
];
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const position = (i / 255) * (STOPS.length - 1),
    low = Math.min(Math.floor(position), STOPS.length - 2),
    t = position - low;
  return STOPS[low].map((channel, k) => Math.round(channel + t * (STOPS[low + 1][k] - channel)));
});
const veil = (value) => smooth(value, 0.02, 0.5); // how opaque a value is: what does not matter leaves the image clear

/** The cells of a map: little-endian 16-bit integers in base64, as fractions of one. `peak` is the highest. */
function cells(map) {
  if (!map.cells) {
    const bytes = Uint8Array.from(atob(map.values.data), (c) => c.charCodeAt(0));
    map.cells = Float32Array.from(
      { length: bytes.length / 2 },
      (_, i) => (bytes[2 * i] | (bytes[2 * i + 1] << 8)) / 65535,
    );
    map.peak = Math.max(...map.cells);
  }
  return map.cells;
}

/**
 * Bilinear, half-pixel centres: as the model's own mask is scaled (align_corners=False). Of fewer than 5 cells along a
 * side, blocks: smooth, so few would look like many.
 */
function upscale(source, w, h, width, height) {
  const out = new Float32Array(width * height),
    settle = Math.min(w, h) < 5 ? Math.round : (place) => place;
  const column = Array.from({ length: width }, (_, x) => settle(clamp(((x + 0.5) * w) / width - 0.5, 0, w - 1)));
  for (let y = 0; y < height; y++) {
    const fy = settle(clamp(((y + 0.5) * h) / height - 0.5, 0, h - 1)),
      top = Math.floor(fy),
      ty = fy - top,
      bottom = Math.min(top + 1, h - 1);
    for (let x = 0; x < width; x++) {
      const left = Math.floor(column[x]),
        tx = column[x] - left,
        right = Math.min(left + 1, w - 1);
      const upper = source[top * w + left] * (1 - tx) + source[top * w + right] * tx;
      const lower = source[bottom * w + left] * (1 - tx) + source[bottom * w + right] * tx;
      out[y * width + x] = upper * (1 - ty) + lower * ty;
    }
  }
  return out;
}

/** The map at drawing size, stretched so that its highest cell is 1; kept. */
function field(map, width, height) {
  if (!map.field || map.field.width !== width || map.field.height !== height) {
    const stretched = cells(map).map((value) => value / (map.peak || 1));
    map.field = { width, height, values: upscale(stretched, map.values.w, map.values.h, width, height) };
  }
  return map.field.values;
}

/** Cells that the model sees, most important first; ties in a fixed random order so that no place is favoured. */
function ranking(map, shape) {
  if (!map.ranking) {
    const values = cells(map);
    let seed = 0x9e3779b9;
    const dice = Array.from(values, () => {
      // mulberry32
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return (t ^ (t >>> 14)) >>> 0;
    });
    const { w, h } = map.values;
    map.ranking = Array.from(values.keys())
      .filter((i) => !hidden(shape, ((i % w) + 0.5) / w, (Math.floor(i / w) + 0.5) / h))
      .sort((a, b) => values[b] - values[a] || dice[a] - dice[b]);
  }
  return map.ranking;
}

// ---------------------------------------------------------------- images

const images = new Map();
function loadImage(source) {
  if (!source) return Promise.resolve(null);
  if (!images.has(source)) {
    images.set(
      source,
      new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => resolve(null);
        image.src = source;
      }),
    );
  }
  return images.get(source);
}

function fit(size, long) {
  const scale = long / Math.max(size.w, size.h);
  return [Math.max(1, Math.round(size.w * scale)), Math.max(1, Math.round(size.h * scale))];
}

function pixels(image, width, height) {
  const context = make("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
  if (image) context.drawImage(image, 0, 0, width, height);
  else {
    context.fillStyle = "#8d8a84";
    context.fillRect(0, 0, width, height);
  }
  return context.getImageData(0, 0, width, height);
}

function paint(canvas, image, map, { mode, opacity, long }, shape) {
  const [width, height] = fit(shape, long);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const frame = pixels(image, width, height),
    data = frame.data;
  if (map?.values && mode !== "image") {
    const values = field(map, width, height);
    for (let i = 0, p = 0; i < values.length; i++, p += 4) {
      if (mode === "heat") {
        const colour = COLOURS[Math.round(clamp(values[i]) * 255)],
          alpha = opacity * veil(values[i]);
        for (let k = 0; k < 3; k++) data[p + k] += alpha * (colour[k] - data[p + k]);
      } else {
        const grey = 0.3 * data[p] + 0.59 * data[p + 1] + 0.11 * data[p + 2];
        const away = opacity * (1 - smooth(values[i], 0.08, 0.5));
        const dim = 10 + grey * 0.16;
        for (let k = 0; k < 3; k++) data[p + k] += away * (dim - data[p + k]);
      }
    }
  }
  context.putImageData(frame, 0, 0);
}

function hatch(canvas, seen) {
  // stripes over what the model never saw
  const visible = seenCells(seen);
  const context = canvas.getContext("2d"),
    layer = make("canvas", { width: canvas.width, height: canvas.height }),
    ink = layer.getContext("2d");
  ink.fillStyle = "rgb(20 20 20 / .55)";
  const cellWidth = canvas.width / seen.w,
    cellHeight = canvas.height / seen.h;
  for (let y = 0; y < seen.h; y++)
    for (let x = 0; x < seen.w; x++) {
      if (!visible[y * seen.w + x]) {
        const left = Math.round(x * cellWidth),
          top = Math.round(y * cellHeight);
        ink.fillRect(left, top, Math.round((x + 1) * cellWidth) - left, Math.round((y + 1) * cellHeight) - top);
      }
    }
  ink.globalCompositeOperation = "source-atop";
  ink.strokeStyle = "rgb(255 255 255 / .42)";
  ink.lineWidth = canvas.width / 260;
  const step = canvas.width / 58;
  for (let x = -canvas.height; x < canvas.width; x += step) {
    ink.beginPath();
    ink.moveTo(x, canvas.height);
    ink.lineTo(x + canvas.height, 0);
    ink.stroke();
  }
  context.drawImage(layer, 0, 0);
}
