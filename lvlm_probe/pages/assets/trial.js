// Whether to believe the map: verdict, curves, the image taken apart along them, scores, tables.

// ---------------------------------------------------------------- verdict, curves, scores

function drawVerdict() {
  const { verdict, sanity, edits } = current();
  page.verdict.className = `banner ${verdict.state}`;
  page.verdict.dataset.state = verdict.state;
  page.verdict.replaceChildren(make("strong", { textContent: verdict.title }));
  if (verdict.reasons.length > 1)
    page.verdict.append(make("ul", {}, ...verdict.reasons.map((reason) => make("li", { textContent: reason }))));
  else if (verdict.reasons.length) page.verdict.append(make("p", { textContent: verdict.reasons[0] }));
  page.sanity.hidden = !sanity.length;
  page.sanity.replaceChildren(
    ...sanity.map(({ state, title, reason }) =>
      make(
        "li",
        {},
        make("i", { className: `dot ${state}`, "aria-hidden": "true" }),
        make("b", { textContent: `${title}. ` }),
        reason,
      ),
    ),
  );
  page.edits.hidden = !edits.length;
  page.edits.replaceChildren(...edits.map(drawEdit));
}

/** What the model says with a region taken away: the image it saw, its answer, and the words that changed. */
function drawEdit({ src, lead, answer, same, flipped, changes, notes }) {
  const said = same
    ? make("p", { textContent: "it says the same." })
    : make("p", {}, "it says ", make("q", { dir: "auto", textContent: answer }));
  const words = changes.map(([before, after]) =>
    make("span", {}, make("del", { textContent: before || "nothing" }), " → ", make("ins", { textContent: after || "nothing" })),
  );
  const text = make("figcaption", {}, make("b", { textContent: lead }), said, ...words);
  if (!same && !flipped) text.append(make("p", { textContent: "The explained words stay." }));
  text.append(...notes.map((note) => make("p", { textContent: note })));
  return make("figure", {}, ...(src ? [make("img", { src, alt: `${lead}: what the model saw` })] : []), text);
}

function interpolate(xs, ys, x) {
  let i = 1;
  while (i < xs.length - 1 && xs[i] < x) i++;
  const t = xs[i] > xs[i - 1] ? clamp((x - xs[i - 1]) / (xs[i] - xs[i - 1])) : 1;
  return ys[i - 1] + t * (ys[i] - ys[i - 1]);
}

const CHART = { left: 40, top: 10, width: 440, height: 240 }; // width: of the column it stands in
function chartScale(score) {
  const all = [...score.deletion_curve, ...score.insertion_curve, 0, 1];
  const low = Math.min(...all),
    high = Math.max(...all);
  return {
    x: (f) => CHART.left + f * CHART.width,
    y: (v) => CHART.top + ((high - v) / (high - low)) * CHART.height,
    low,
    high,
  };
}

/** Round values to write on an axis: 0, 0.5 and 1, or fewer and farther ones where curves leave that range. */
function ticks(low, high) {
  if (high - low < 2) return [0, 0.5, 1];
  const rough = (high - low) / 5,
    unit = 10 ** Math.floor(Math.log10(rough)),
    step = unit * [1, 2, 5, 10].find((times) => times * unit >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(6)));
  return found;
}

function drawChart() {
  const { score } = current();
  page.chart.replaceChildren();
  page.chart.parentElement.hidden = !score;
  if (!score) return;
  CHART.width = Math.max(200, page.chart.clientWidth - CHART.left - 12);
  CHART.height = clamp(0.55 * CHART.width, 190, 280);
  const { x, y, low, high } = chartScale(score),
    right = x(1),
    base = y(0);
  const svg = vector("svg", {
    viewBox: `0 0 ${CHART.left + CHART.width + 12} ${CHART.top + CHART.height + 46}`,
    role: "img",
    "aria-label": `Deletion falls to an area of ${decimal(score.deletion)}, insertion rises to an area of ${decimal(score.insertion)}`,
  });
  const across = (kind, value) => svg.append(vector("line", { class: kind, x1: x(0), x2: right, y1: y(value), y2: y(value) }));
  const write = (text, place) => svg.append(vector("text", place, text));
  for (const value of ticks(low, high)) {
    across("axis", value);
    write(String(value).replace("-", "−"), { class: "level", x: x(0) - 8, y: y(value) + 4, "text-anchor": "end" });
  }
  if (high - low >= 2) for (const value of [0, 1]) across("reference", value);
  for (const [value, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]])
    write(`${100 * value} %`, { x: x(value), y: CHART.top + CHART.height + 19, "text-anchor": anchor });
  write("share of the image, most important first", { x: x(0.5), y: CHART.top + CHART.height + 39, "text-anchor": "middle" });
  svg.append(
    vector("line", { class: "reference", x1: x(0), y1: y(1), x2: right, y2: y(0) }),
    vector("line", { class: "reference", x1: x(0), y1: y(0), x2: right, y2: y(1) }),
  );
  for (const [kind, ys] of [
    ["del", score.deletion_curve],
    ["ins", score.insertion_curve],
  ]) {
    const points = score.fractions.map((f, i) => `${x(f).toFixed(1)},${y(ys[i]).toFixed(1)}`);
    svg.append(
      vector("polygon", { class: `fill ${kind}`, points: `${x(0)},${base} ${points.join(" ")} ${right},${base}` }),
    );
    svg.append(vector("polyline", { class: `line ${kind}`, points: points.join(" ") }));
  }
  // Outside the plot, so that no curve runs through them.
  page.keys.replaceChildren(
    ...[
      ["ins", `insertion ${decimal(score.insertion)}`],
      ["del", `deletion ${decimal(score.deletion)}`],
      ["area", high - low < 2 ? "no better than area: 0.5" : "0, 1 and no better than area"],
    ].map(([kind, text]) => make("span", {}, make("i", { className: kind, "aria-hidden": "true" }), text)),
  );
  svg.append(
    vector("line", { class: "cursor", y1: CHART.top, y2: CHART.top + CHART.height }),
    vector("circle", { class: "point del", r: 5 }),
    vector("circle", { class: "point ins", r: 5 }),
  );
  const follow = (event) => {
    const box = svg.getBoundingClientRect(),
      scale = (CHART.left + CHART.width + 12) / box.width;
    chooseFraction(clamp(((event.clientX - box.left) * scale - CHART.left) / CHART.width));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  page.chart.append(svg);
}

function composite(canvas, first, second, share) {
  // share 1 = first image
  const { width, height } = first,
    frame = new ImageData(width, height);
  for (let i = 0, p = 0; i < share.length; i++, p += 4) {
    for (let k = 0; k < 3; k++)
      frame.data[p + k] = second.data[p + k] + share[i] * (first.data[p + k] - second.data[p + k]);
    frame.data[p + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(frame, 0, 0);
}

async function drawTrial() {
  const at = `${state.sample}.${state.map}`,
    map = current(),
    { score } = map,
    f = state.fraction;
  page.fraction.value = 100 * f;
  page.fractiontext.textContent = `${(100 * f).toFixed(f < 0.1 ? 1 : 0)} % of the image`;
  if (score) {
    const { x, y } = chartScale(score),
      deletion = interpolate(score.fractions, score.deletion_curve, f),
      insertion = interpolate(score.fractions, score.insertion_curve, f);
    const svg = page.chart.firstChild,
      [cursor, del, ins] = [
        svg.querySelector(".cursor"),
        svg.querySelector("circle.del"),
        svg.querySelector("circle.ins"),
      ];
    cursor.setAttribute("x1", x(f));
    cursor.setAttribute("x2", x(f));
    del.setAttribute("cx", x(f));
    del.setAttribute("cy", y(deletion));
    ins.setAttribute("cx", x(f));
    ins.setAttribute("cy", y(insertion));
    const words = (curve, normalised) =>
      curve
        ? `${score.own ?? "words"} at ${inUnit(score, interpolate(score.fractions, curve, f))}`
        : `score ${decimal(normalised)}`;
    page.removedtext.textContent = words(score.deletion_raw, deletion);
    page.restoredtext.textContent = words(score.insertion_raw, insertion);
  } else page.removedtext.textContent = page.restoredtext.textContent = "";
  if (page.pair.hidden) return;
  const shape = shown(),
    [image, baseline] = await Promise.all([loadImage(shape.src), loadImage(map.baseline.src)]);
  if (at !== `${state.sample}.${state.map}` || !image || !baseline) return;
  if (map.trial?.at !== at) {
    const [width, height] = fit(shape, 360);
    map.trial = { at, first: pixels(image, width, height), second: pixels(baseline, width, height) };
  }
  const order = ranking(map, shape),
    kept = new Float32Array(map.values.w * map.values.h);
  for (let i = 0; i < Math.round(state.fraction * order.length); i++) kept[order[i]] = 1;
  const { first, second } = map.trial,
    share = upscale(kept, map.values.w, map.values.h, first.width, first.height);
  composite(page.restored, first, second, share);
  composite(page.removed, second, first, share);
  page.removed.dataset.fraction = page.restored.dataset.fraction = state.fraction;
}

function chooseFraction(fraction) {
  state.fraction = fraction;
  nextFrame(drawTrial);
}

function play() {
  if (state.timer) {
    stop();
    return;
  }
  const from = performance.now(),
    seconds = 6;
  page.play.textContent = "❚❚";
  const step = (now) => {
    const t = (now - from) / (1000 * seconds);
    chooseFraction(clamp(t * t)); // slowly at first: that is where the curves move
    if (t < 1) state.timer = requestAnimationFrame(step);
    else stop();
  };
  state.timer = requestAnimationFrame(step);
}
function stop() {
  cancelAnimationFrame(state.timer);
  state.timer = 0;
  if (page.play) page.play.textContent = "▶";
}

function card({ label, value, note, text, gauge, bad, thumb }) {
  const box = make(
    "div",
    { className: bad ? "card bad" : "card" },
    make("p", { className: "label", textContent: label }),
  );
  box.append(make("p", { className: "value" }, value, note ? make("small", { textContent: ` ${note}` }) : ""));
  if (gauge) {
    const fill = make("i"),
      bar = make("div", { className: "gauge" }, fill);
    fill.style.width = `${100 * clamp(gauge.value)}%`;
    bar.style.color = `var(--${gauge.colour})`;
    if (known(gauge.mark)) {
      const mark = make("u");
      mark.style.left = `${100 * clamp(gauge.mark)}%`;
      bar.append(mark);
    }
    box.append(bar);
  }
  if (thumb) box.append(make("img", { className: "thumb", src: thumb, alt: "The baseline image" }));
  box.append(make("p", { textContent: text }));
  return box;
}

/** A value of what the curves follow. */
function inUnit(score, value) {
  if (score.unit === "nats") return `${decimal(value)} nats`;
  return score.unit === "own" ? decimal(value) : percent(value);
}

/** What an area outside [0, 1] says, beside its number. */
function drawRemarks(score) {
  page.remarks.replaceChildren(...(score?.remarks ?? []).map((textContent) => make("p", { textContent })));
}

function drawCards() {
  const { score, baseline } = current(),
    list = [];
  if (score) {
    list.push({
      label: "Deletion",
      value: decimal(score.deletion),
      note: "lower is better",
      gauge: { value: score.deletion, colour: "ember", mark: 0.5 },
      bad: score.deletion >= 0.5,
      text: `How much of ${score.own ? `“${score.own}”` : "the words’ probability"} is left, on average, while the most important parts are taken away. The mark is 0.5.`,
    });
    list.push({
      label: "Insertion",
      value: decimal(score.insertion),
      note: "higher is better",
      gauge: { value: score.insertion, colour: "teal", mark: 0.5 },
      bad: score.insertion <= 0.5,
      text: "How much of it is back, on average, while only the most important parts are returned to the baseline.",
    });
  }
  if (known(baseline.probability) || (baseline.src && !score?.own)) {
    const passed = !known(baseline.probability) || baseline.probability < baseline.threshold;
    list.push({
      label: "Baseline check",
      value: known(baseline.probability) ? percent(baseline.probability) : "–",
      note: known(baseline.original) ? `from ${percent(baseline.original)} with the image` : "",
      bad: !passed,
      thumb: baseline.src,
      gauge: known(baseline.probability)
        ? { value: baseline.probability, colour: passed ? "good" : "bad", mark: baseline.threshold }
        : null,
      text: `Mean probability of the explained words under the baseline${baseline.name ? ` (${baseline.name})` : ""}. ${
        !known(baseline.probability)
          ? "It was not measured."
          : passed
            ? `Under ${percent(baseline.threshold)}: the baseline really hides what they need.`
            : `Not under ${percent(baseline.threshold)}: the baseline still shows what they need, so the curves say little.`
      }`,
    });
  }
  if (score && known(score.tie_share))
    list.push({
      label: "Ties",
      value: percent(score.tie_share),
      gauge: { value: score.tie_share, colour: "soft" },
      text: "Share of the map’s cells with the very same value as another. Their order is drawn at random, so many ties make the curves a matter of luck.",
    });
  if (score && known(score.best_random)) {
    const gain = score.insertion - score.deletion;
    list.push({
      label: "Against chance",
      value: decimal(gain),
      note: `random: ${decimal(score.best_random)} at best`,
      bad: gain <= score.best_random,
      text: `Insertion minus deletion, and the best that ${score.randoms} random map${score.randoms > 1 ? "s" : ""} reached on the same grid.`,
    });
  }
  if (score && known(score.center)) {
    const gain = score.insertion - score.deletion;
    list.push({
      label: "Against the middle",
      value: decimal(gain),
      note: `a blob there: ${decimal(score.center)}`,
      gauge: { value: gain, colour: "teal", mark: score.center },
      bad: gain < score.center - 0.05,
      text: "Insertion minus deletion. The mark is what a blob in the middle of the image has, made without looking: a map that is level with it may only say that things stand in the middle.",
    });
  }
  if (score && known(score.synergy))
    list.push({
      label: "Image and question together",
      value: decimal(score.synergy),
      note: `all there is: ${decimal(score.together)}`,
      text: "What neither gives alone (F_syn): its mean as the map’s cells are taken away, the first ones first. The nearer to all there is, the more of it the map puts first; where there is nothing, the question or the image alone gives the words.",
    });
  const { passes, diagnostics } = current().provenance;
  if (known(passes?.forward))
    list.push({
      label: "Passes",
      value: `${passes.forward} + ${passes.backward}`,
      text: `Images that went through the model for this map, forward and backward, the choice of words included. ${
        diagnostics?.stopped ? `It ended after ${diagnostics.rounds.length} round${diagnostics.rounds.length > 1 ? "s" : ""}: ${diagnostics.stopped}.` : ""
      }`,
    });
  page.cards.replaceChildren(...list.map(card));
  drawRemarks(score);
}

// ---------------------------------------------------------------- numbers and provenance

function drawTokens() {
  const { tokens, skipped, whole } = sample();
  page.tokensbox.hidden = !tokens.length;
  const body = tokens.map((token, i) =>
    make(
      "tr",
      {},
      make("td", { className: "number", textContent: i }),
      make("td", {}, make("code", { textContent: token.text })),
      ...[token.p, token.p0].map((p) => make("td", { className: "number", textContent: percent(p) })),
      make("td", { className: "number", textContent: known(token.llr) ? signed(token.llr) : "–" }),
      make("td", {
        textContent: whole.includes(i) ? "selected" : (skipped[i] ?? (token.special ? "special token" : "")),
      }),
    ),
  );
  const head = [
    ["#", 1],
    ["Token", 0],
    ["P with image", 1],
    ["P without", 1],
    ["LLR, nats", 1],
    ["Explained", 0],
  ];
  page.tokens.replaceChildren(
    make(
      "table",
      {},
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          ...head.map(([text, number]) =>
            make("th", { textContent: text, className: number ? "number" : "", scope: "col" }),
          ),
        ),
      ),
      make("tbody", {}, ...body),
    ),
  );
}

function provenance() {
  return {
    map: current().provenance,
    sample: sample().provenance,
    score: current().scoring && { ...current().scoring, curves: current().score },
    verdict: current().verdict,
  };
}

function drawProvenance() {
  const body = make("tbody"),
    show = (value) => (value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
  for (const [title, facts] of [
    ["This map", current().provenance],
    ["Recording", sample().provenance],
  ]) {
    body.append(make("tr", { className: "head" }, make("th", { colSpan: 2, textContent: title })));
    for (const [key, value] of Object.entries(facts))
      body.append(
        make(
          "tr",
          {},
          make("th", { textContent: key.replaceAll("_", " "), scope: "row" }),
          make("td", { textContent: show(value) }),
        ),
      );
  }
  page.provenance.replaceChildren(make("table", { className: "pairs" }, body));
}

async function copy() {
  const text = JSON.stringify(provenance(), null, 2);
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no permission, or an old browser: the selection way
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  page.copied.textContent = "Copied.";
}
