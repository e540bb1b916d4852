// Page of a study: which samples are shown, in which order, with what side by side. Rows are made as they are scrolled
// to, and what is far out of sight gives its images back, so that thousands of samples can be looked through.
(() => {
  const CHUNK = 16;
  const data = JSON.parse(document.getElementById("data").textContent);
  const { samples, models, methods } = data;
  const $ = (id) => document.getElementById(id);
  const order = new Intl.Collator(undefined, { numeric: true });
  const state = {
    by: data.by, model: 0, method: 0, heat: true, find: "", dataset: "", group: "", right: "", sort: "place", of: "",
    down: false, from: null, to: null, list: [], shown: 0,
  };

  // ---------------------------------------------------------------- details: in the page, or in files beside it

  const arriving = new Map();
  window.lvlm_probe_part = (number, details) => arriving.get(number)?.(details);
  const parts = new Map();
  function detail(sample) {
    if (data.details) return Promise.resolve(data.details[sample.n]);
    const number = Math.floor(sample.n / data.part);
    if (!parts.has(number)) {
      parts.set(
        number,
        new Promise((resolve, reject) => {
          arriving.set(number, resolve);
          const script = make("script", { src: `data/part-${String(number).padStart(5, "0")}.js` });
          script.onload = () => script.remove();
          script.onerror = () => {
            parts.delete(number);
            reject(new Error(`data/part-${number} cannot be loaded`));
          };
          document.head.append(script);
        }),
      );
    }
    return parts.get(number).then((details) => details[sample.n - number * data.part]);
  }

  // ---------------------------------------------------------------- rows: samples, or sets of them

  const groups = [];
  {
    const sets = new Map();
    for (const sample of samples) {
      if (sample.set === null || sample.set === undefined) continue;
      const key = `${sample.dataset}/${sample.set}`;
      if (!sets.has(key)) sets.set(key, { members: [], place: groups.length, name: sample.set });
      if (sets.get(key).members.push(sample) === 2) groups.push(sets.get(key));
    }
  }
  const items = () => (state.by === "groups" ? groups : samples.map((sample) => ({ members: [sample], place: sample.n })));
  for (const sample of samples)
    sample.words = [sample.id, sample.question, sample.truth, sample.set, ...sample.answers.map((one) => one?.text)]
      .filter(Boolean).join("\n").toLowerCase();

  /** The cells of a row: which answer and map stands in each. */
  function cells(item) {
    if (state.by === "groups")
      return item.members.map((sample) => ({ sample, model: state.model, method: state.method, name: sample.role ?? sample.id }));
    const [sample] = item.members;
    if (state.by === "models") return models.map((name, model) => ({ sample, model, method: state.method, name }));
    return methods.map((name, method) => ({ sample, model: state.model, method, name }));
  }
  const chosen = (item) => (state.of === "" || state.by === "groups" ? cells(item) : [cells(item)[Number(state.of)]]);
  const mean = (values) => {
    const all = values.filter(known);
    return all.length ? all.reduce((sum, value) => sum + value, 0) / all.length : null;
  };
  const scoreOf = (cell) => cell.sample.maps[cell.model][cell.method];
  /** Scores that measure something: the others have no place among the sorted. */
  const countedOf = (cell) => (scoreOf(cell)?.counts === false ? null : scoreOf(cell));
  const answerOf = (cell) => cell.sample.answers[cell.model];
  const over = (read) => (item) => mean(chosen(item).map(read));
  const SORTS = {
    place: ["order of the data set", (item) => item.place],
    gain: ["gain", over((cell) => (countedOf(cell) && known(countedOf(cell).deletion) && known(countedOf(cell).insertion) ? countedOf(cell).insertion - countedOf(cell).deletion : null))],
    deletion: ["deletion", over((cell) => countedOf(cell)?.deletion)],
    insertion: ["insertion", over((cell) => countedOf(cell)?.insertion)],
    agreement: [
      "agreement of columns",
      ({ members: [sample] }) => (state.by === "models" ? sample.agree.models[state.method] : sample.agree.methods[state.model]),
    ],
    drop: ["drop in probability", over((cell) => answerOf(cell)?.drop)],
    looked: ["map on the change, × its area", over((cell) => cell.sample.looked?.[cell.model][cell.method])],
  };
  const SETS_ONLY = ["looked"], SAMPLES_ONLY = ["agreement"];
  const value = (item) => SORTS[state.sort][1](item);

  const RIGHT = {
    "": ["all", () => true],
    right: ["all right", (marks) => marks.length > 0 && marks.every(Boolean)],
    wrong: ["all wrong", (marks) => marks.length > 0 && !marks.some(Boolean)],
    mixed: ["some right, some wrong", (marks) => marks.some(Boolean) && !marks.every(Boolean)],
    unknown: ["not judged", (marks) => marks.length === 0],
    fooled: ["the same, though the truth is another", (_, item) => item.members.some((sample) => sample.fooled?.[state.model])],
    doubted: ["with a map not to trust", (_, item) => cells(item).some((cell) => scoreOf(cell)?.trusted === false)],
    mapless: ["without a map", (_, item) => !cells(item).some(scoreOf)],
  };
  function fits(item) {
    if (state.find && !item.members.some((sample) => sample.words.includes(state.find))) return false;
    if (state.dataset !== "" && item.members[0].dataset !== Number(state.dataset)) return false;
    if (state.group !== "" && (item.members[0].group ?? "") !== state.group) return false;
    const marks = cells(item).map((cell) => answerOf(cell)?.correct).filter((one) => typeof one === "boolean");
    if (!RIGHT[state.right][1](marks, item)) return false;
    if (state.from === null && state.to === null) return true;
    const found = value(item);
    return known(found) && (state.from === null || found >= state.from) && (state.to === null || found <= state.to);
  }

  // ---------------------------------------------------------------- one row

  function scene(item) {
    const first = item.members[0];
    const box = make("div", { className: "scene" });
    const images = make("div", { className: "originals" });
    box.append(images);
    if (state.by === "groups") {
      box.append(make("p", { className: "question" }, `Set ${item.name}`));
      const fooled = item.members.filter((sample) => sample.fooled?.[state.model]).length;
      const variants = item.members.filter((sample) => known(sample.ref)).length;
      if (item.members.some((sample) => typeof sample.fooled?.[state.model] === "boolean"))
        box.append(make("p", { className: fooled ? "facts doubt" : "facts" },
          fooled ? `${fooled} of ${variants} variants get the same answer as before, though the true answer is another.`
            : "No variant gets the same answer where the true one is another."));
    } else {
      box.append(make("p", { className: "question", textContent: first.question, dir: "auto" }));
      if (first.truth !== null) box.append(make("p", { className: "truth" }, make("span", { textContent: "True answer " }), first.truth));
      if (state.by === "methods") {
        const answer = answerOf(cells(item)[0]);
        box.append(make("div", { className: "answer-of", "data-answer": "" }));
        if (answer?.failed) box.append(make("p", { className: "facts doubt", textContent: answer.failed }));
      }
      const agreement = SORTS.agreement[1](item);
      if (known(agreement) && cells(item).length > 1)
        box.append(make("p", { className: "facts", textContent: `agreement of columns ${decimal(agreement)}` }));
      if (first.dropped) box.append(make("p", { className: "facts", textContent: `no maps: ${first.dropped}` }));
    }
    const facts = [data.datasets[first.dataset], state.by === "groups" ? null : first.id, first.group, state.by === "groups" ? null : first.role];
    box.append(make("p", { className: "facts", textContent: facts.filter(Boolean).join(" · ") }));
    return box;
  }

  function shell(cell) {
    const box = make("div", { className: "cell" });
    box.append(make("p", { className: "name" }, make("span", { textContent: cell.name })));
    const size = cell.sample.size ?? [4, 3];
    const canvas = make("canvas", { role: "img", "aria-label": `Heatmap, ${cell.name}` });
    canvas.width = canvas.height = 0;
    canvas.style.aspectRatio = `${size[0]} / ${size[1]}`;
    const body = make("div", { className: "body" });
    box.append(canvas, make("p", { className: "caption" }), body);
    Object.assign(cell, { box, canvas, caption: box.querySelector(".caption"), body });
    return box;
  }

  function makeRow(item) {
    const element = make("article", { className: "row" });
    const row = { item, element, cells: cells(item), word: null, filled: false, near: false };
    element.append(scene(item), ...row.cells.map(shell));
    element.row = row;
    watch.observe(element);
    return element;
  }

  /** Puts what had to be loaded into a row: words, scores, what changed. Once. */
  async function fill(row) {
    if (!row.filled) {
      row.filled = true;
      try {
        const needed = new Set(row.item.members);
        const loaded = new Map(await Promise.all([...needed].map(async (sample) => [sample, await detail(sample)])));
        for (const cell of row.cells) cell.detail = loaded.get(cell.sample);
      } catch (error) {
        row.filled = false;
        row.cells.forEach((cell) => (cell.caption.textContent = error.message));
        return;
      }
      const images = row.element.querySelector(".originals");
      for (const source of new Set(row.cells.map((cell) => cell.detail.image)))
        if (source) images.append(make("img", { src: source, alt: "The image", decoding: "async" }));
      if (!images.children.length) images.append(make("p", { className: "facts", textContent: "The image is not at hand." }));
      for (const note of new Set(row.cells.flatMap((cell) => cell.detail.notes)))
        row.element.firstChild.append(make("p", { className: "facts doubt", textContent: note }));
      const place = row.element.querySelector("[data-answer]");
      if (place) {
        const [cell] = row.cells;
        const selected = [...new Set(row.cells.flatMap((one) => mapOf(one)?.selected ?? []))];
        place.append(answerLine(row, cell, selected));
      }
      row.cells.forEach((cell) => fillCell(row, cell));
    }
    if (row.near) draw(row);
  }

  const mapOf = (cell) => cell.detail.maps[cell.model][cell.method];
  function answerLine(row, cell, selected) {
    const answer = answerOf(cell);
    if (!answer || answer.failed) return make("p", { className: "facts", textContent: answer ? answer.failed : "No answer yet." });
    const line = said(cell.detail.words[cell.model], selected, (text, place) => choose(row, cell, text, place));
    line.prepend(mark(answer.correct));
    return line;
  }

  function fillCell(row, cell) {
    const map = mapOf(cell), score = scoreOf(cell), { body } = cell;
    if (state.by === "groups") {
      const { change } = cell.detail;
      body.append(change?.question ? differing(change.question) : make("p", { className: "question", textContent: cell.sample.question, dir: "auto" }));
      if (cell.sample.truth !== null)
        body.append(make("p", { className: "truth" }, make("span", { textContent: "True answer " }), cell.sample.truth));
    }
    if (state.by !== "methods") body.append(answerLine(row, cell, map?.selected ?? []));
    if (map?.values && score) body.append(scores(score, map.verdict));
    if (state.by !== "groups") {
      const own = agreement(cell, row.cells);
      const facts = [];
      if (known(own) && row.cells.length > 2) facts.push(`agreement with the others ${decimal(own)}`);
      if (known(score?.pointing)) facts.push(score.pointing >= 0.5 ? "points into the region" : "points elsewhere");
      if (facts.length) body.append(make("p", { className: "facts", textContent: facts.join(" · ") }));
    } else if (cell.detail.change) {
      const { sample, model, method } = cell;
      const base = samples[sample.ref];
      const name = base.role === "original" ? "the original" : base.role ? `the ${base.role}` : base.id;
      body.append(changes(cell.detail.change, cell.detail.change.looks[model][method], sample.same[model], sample.fooled[model], name));
      body.append(make("p", { className: "facts", textContent: sample.id }));
    } else body.append(make("p", { className: "facts", textContent: cell.sample.id }));
  }

  /** Mean rank correlation of a column's map with the other columns'. */
  function agreement(cell, all) {
    const own = all.indexOf(cell);
    const pairs = state.by === "models" ? cell.detail.pairs.models[cell.method] : cell.detail.pairs.methods[cell.model];
    const found = [];
    let place = 0;
    for (let a = 0; a < all.length; a++) for (let b = a + 1; b < all.length; b++, place++) if (a === own || b === own) found.push(pairs[place]);
    return mean(found);
  }

  /** A click on a word: all columns turn to it, and back at the second click. */
  function choose(row, cell, text, place) {
    const words = cell.detail.words[cell.model].words;
    const earlier = words.slice(0, place).filter(([, other]) => (bare(other) || other) === text).length;
    const again = row.word && row.word.text === text && row.word.earlier === earlier;
    row.word = again ? null : { text, shown: words[place][1], earlier };
    draw(row);
  }

  /** Where the chosen word stands in a cell's answer: the same occurrence, or else its first; -1 when it does not. */
  function placeOf(row, cell) {
    if (!row.word) return -1;
    const found = [];
    (cell.detail.words[cell.model]?.words ?? []).forEach(([, text], place) => {
      if ((bare(text) || text) === row.word.text) found.push(place);
    });
    return found[Math.min(row.word.earlier, found.length - 1)] ?? -1;
  }

  /** What a cell shows now: values, and the sentence under it. */
  function showing(row, cell) {
    const map = mapOf(cell);
    if (!map) return [null, answerOf(cell)?.failed ? "no answer" : cell.sample.dropped ? "no map: the filter drops this sample" : "no map yet"];
    if (!map.values) return [null, `no map: ${map.none}`];
    if (!row.word) return [map.values, map.selected.length ? "map of the underlined words" : `map of “${map.text ?? ""}”`];
    const place = placeOf(row, cell);
    if (place < 0) return [map.values, `“${row.word.shown}” is not in this answer: the whole answer’s map`];
    const llr = cell.detail.words[cell.model].words[place][2];
    const own = map.words[place];
    if (own === true || own?.data) return [own === true ? map.values : own, `map of “${row.word.shown}” · ${ratio(llr)}`];
    const why = typeof own === "string" ? `no map of it: ${own}` : map.selected.includes(place) ? "no map of this word alone is stored" : "not among the words that are explained";
    return [map.values, `“${row.word.shown}” ${ratio(llr)}: ${why}; this is the whole answer’s map`];
  }

  async function draw(row) {
    const turn = (row.turn = (row.turn ?? 0) + 1);
    for (const cell of row.cells) {
      if (!cell.detail) return;
      const [values, caption] = showing(row, cell);
      cell.caption.textContent = caption;
      cell.canvas.setAttribute("aria-label", `${cell.name}: ${caption}`);
      cell.image ??= await openImage(cell.detail.image);
      if (row.turn !== turn || !row.near) return;
      drawMap(cell.canvas, cell.image, cell.sample.size ?? [4, 3], mapOf(cell), values, cell.detail.change?.region, state.heat);
    }
    const lines = row.element.querySelectorAll(".said");
    for (const line of lines) {
      const cell = row.cells.find((one) => one.box.contains(line)) ?? row.cells[0];
      const place = placeOf(row, cell);
      for (const button of line.querySelectorAll(".word"))
        button.setAttribute("aria-pressed", String(Number(button.dataset.place) === place));
    }
    row.element.dataset.drawn = row.word ? row.word.shown : "";
  }

  function openImage(source) {
    if (!source) return Promise.resolve(null);
    return new Promise((resolve) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => resolve(null);
      image.src = source;
    });
  }

  /** A row far out of sight keeps its place, not its pixels. */
  function release(row) {
    row.turn = (row.turn ?? 0) + 1;
    delete row.element.dataset.drawn;
    for (const cell of row.cells) {
      cell.canvas.width = cell.canvas.height = 0;
      delete cell.image;
    }
  }

  const watch = new IntersectionObserver(
    (seen) => {
      for (const { target, isIntersecting } of seen) {
        const { row } = target;
        if (row.near === isIntersecting) continue;
        row.near = isIntersecting;
        if (isIntersecting) fill(row);
        else release(row);
      }
    },
    { rootMargin: "900px" },
  );

  // ---------------------------------------------------------------- the list

  function grow() {
    const next = state.list.slice(state.shown, state.shown + CHUNK);
    $("rows").append(...next.map(makeRow));
    state.shown += next.length;
    $("more").hidden = state.shown >= state.list.length;
  }

  function list() {
    const turn = state.down ? -1 : 1;
    const all = items();
    const noun = state.by === "groups" ? "sets" : "samples";
    state.list = all.filter(fits).map((item) => [value(item), item]);
    state.list.sort(([x, a], [y, b]) => {
      if (!known(x) || !known(y)) return known(y) - known(x) || a.place - b.place; // not known: last either way
      return turn * (x - y) || a.place - b.place;
    });
    state.list = state.list.map(([, item]) => item);
    watch.disconnect();
    $("rows").replaceChildren();
    const columns = state.by === "groups" ? Math.max(1, ...state.list.map((item) => item.members.length)) : state.by === "models" ? models.length : methods.length;
    $("rows").style.setProperty("--columns", columns);
    state.shown = 0;
    grow();
    $("count").textContent = state.list.length === all.length ? `${all.length} ${noun}` : `${state.list.length} of ${all.length} ${noun}`;
  }

  // ---------------------------------------------------------------- controls

  const options = (select, pairs, now) => {
    select.replaceChildren(...pairs.map(([key, text]) => make("option", { value: key, textContent: text, selected: String(key) === String(now) })));
  };
  /** Which controls there are follows from what stands side by side. */
  function arrange() {
    const sets = state.by === "groups";
    for (const button of $("by").children) button.setAttribute("aria-pressed", String(button.value === state.by));
    $("modelbox").hidden = state.by === "models" || models.length < 2;
    $("methodbox").hidden = state.by === "methods" || methods.length < 2;
    const kinds = Object.keys(SORTS).filter((key) => !(sets ? SAMPLES_ONLY : SETS_ONLY).includes(key));
    if (!kinds.includes(state.sort)) state.sort = "place";
    options($("sort"), kinds.map((key) => [key, SORTS[key][0]]), state.sort);
    const columns = state.by === "models" ? models : methods;
    if (sets || Number(state.of) >= columns.length) state.of = "";
    options($("of"), [["", "all columns (mean)"], ...columns.map((name, place) => [place, name])], state.of);
    $("ofbox").hidden = sets || columns.length < 2 || ["place", "agreement"].includes(state.sort);
    $("rangebox").hidden = state.sort === "place";
    const rules = Object.keys(RIGHT).filter((key) => key !== "fooled" || sets);
    if (!rules.includes(state.right)) state.right = "";
    options($("right"), rules.map((key) => [key, RIGHT[key][0]]), state.right);
  }
  const update = () => {
    arrange();
    list();
  };

  for (const [key, text] of [["models", "Models"], ["methods", "Methods"], ["groups", "Sets"]]) {
    if (key === "groups" && !samples.some((sample) => known(sample.ref))) continue;
    const button = make("button", { type: "button", value: key, textContent: text });
    button.addEventListener("click", () => {
      Object.assign(state, { by: key, of: "" });
      update();
    });
    $("by").append(button);
  }
  options($("model"), models.map((name, place) => [place, name]), 0);
  options($("method"), methods.map((name, place) => [place, name]), 0);
  options($("dataset"), [["", "all"], ...data.datasets.map((name, place) => [place, name])], "");
  $("datasetbox").hidden = data.datasets.length < 2;
  const names = [...new Set(samples.map((sample) => sample.group).filter(Boolean))].sort(order.compare);
  options($("group"), [["", "all"], ...names.map((name) => [name, name])], "");
  $("groupbox").hidden = names.length < 2;

  const onChange = (id, set) => $(id).addEventListener("change", (event) => {
    set(event.target.value);
    update();
  });
  onChange("model", (chosen) => (state.model = Number(chosen)));
  onChange("method", (chosen) => (state.method = Number(chosen)));
  for (const id of ["dataset", "group", "right", "of"]) onChange(id, (chosen) => (state[id] = chosen));
  onChange("sort", (chosen) => {
    Object.assign(state, { sort: chosen, from: null, to: null });
    $("from").value = $("to").value = "";
  });
  for (const id of ["from", "to"]) onChange(id, (given) => (state[id] = given === "" || Number.isNaN(Number(given)) ? null : Number(given)));
  $("turn").addEventListener("click", () => {
    state.down = !state.down;
    $("turn").textContent = state.down ? "highest first" : "lowest first";
    $("turn").setAttribute("aria-pressed", String(state.down));
    list();
  });
  $("veil").addEventListener("click", () => {
    state.heat = !state.heat;
    $("veil").textContent = state.heat ? "Hide heat" : "Show heat";
    $("veil").setAttribute("aria-pressed", String(!state.heat));
    for (const element of $("rows").children) if (element.row.near) draw(element.row);
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  let waiting = 0;
  $("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.find = event.target.value.trim().toLowerCase();
      list();
    }, 150);
  });
  const ahead = new IntersectionObserver(
    (seen) => {
      if (!seen.some((one) => one.isIntersecting)) return;
      grow();
      ahead.unobserve($("more")); // so that it is asked again where the new rows do not fill the window
      ahead.observe($("more"));
    },
    { rootMargin: "1200px" },
  );
  update();
  ahead.observe($("more"));
  document.documentElement.dataset.ready = "true";
})();
