// The language-prior meter: which answers are shown, in which order. Rows are made as they are scrolled to, so that
// thousands of answers open at once; every string of the data becomes text, never markup.
(() => {
  "use strict";
  const CHUNK = 60;
  const NAMES = { unlikely: "Not this model", habit: "From habit", image: "From the image", unknown: "Not known" };
  const { rows, images, worst } = JSON.parse(document.getElementById("data").textContent);
  rows.forEach((row, place) => {
    row.place = place;
    row.text = `${row.question}\n${row.answer}\n${row.id ?? ""}\n${row.source}\n`.toLowerCase();
  });
  const share = (row, which) => (row.counts[0] ? row.counts[which] / row.counts[0] : null);
  const KEYS = {
    rank: (row) => row.place,
    unlikely: (row) => share(row, 1),
    image: (row) => share(row, 3),
    llr: (row) => row.llr,
    logp: (row) => row.logp,
    words: (row) => row.counts[0],
    place: (row) => row.source,
  };
  const $ = (id) => document.getElementById(id);
  const state = { band: "all", find: "", sort: "rank", down: false, shown: 0, list: [] };
  const order = new Intl.Collator(undefined, { numeric: true });

  const behind = (nats, instead) =>
    `${typeof nats === "number" ? `${nats.toFixed(1)} nats` : nats} behind ${instead ? `“${instead}”` : "its likeliest"}`;
  const number = (value) => (value === null ? "–" : value.toFixed(2).replace("-", "−"));

  /** The class of a word's ground: 6 nats and beyond is full colour, as in the report. */
  function wash(llr) {
    if (llr === null || Math.abs(llr) < 0.05) return "word";
    const step = Math.max(1, Math.round(5 * Math.min(1, Math.abs(llr) / 6) ** 0.65));
    return `word ${llr > 0 ? "with" : "against"}${step}`;
  }

  function line(row) {
    const made = $("row").content.cloneNode(true);
    const ref = (name) => made.querySelector(`[data-ref="${name}"]`);
    if (row.image === null) ref("thumbnail").removeAttribute("src");
    else ref("thumbnail").src = images[row.image];
    ref("question").textContent = row.question;
    const said = ref("said");
    let most = null;
    for (const [before, text, llr, nats, instead] of row.words) {
      said.append(before);
      const word = document.createElement("span");
      word.className = wash(llr);
      word.textContent = text;
      word.title = `LLR ${number(llr)}`;
      if (nats !== undefined) {
        word.classList.add("unlikely");
        word.title = `${behind(nats, instead)} · ${word.title}`;
        if (most === null || typeof nats !== "number" || nats > most[0]) most = [nats, instead, text];
      }
      said.append(word);
    }
    if (!row.words.length) said.textContent = row.answer;
    ref("facts").textContent = [row.id, row.source, row.baseline && `baseline ${row.baseline}`, row.elsewhere && "given elsewhere"]
      .filter(Boolean)
      .join(" · ");
    ref("dot").classList.add(`band-${row.origin}`);
    ref("dot").title = NAMES[row.origin];
    const [words, unlikely, habit, image] = row.counts;
    ref("figure").textContent = most ? `“${most[2]}”` : `${image} of ${words}`;
    ref("unit").textContent = most ? behind(most[0], most[1]) : "words from the image";
    let edge = 0;
    for (const [name, count] of Object.entries({ unlikely, image, habit })) {
      const width = words ? (100 * count) / words : 0;
      ref(name).setAttribute("x", String(edge));
      ref(name).setAttribute("width", String(width));
      edge += width;
    }
    const parts = [`${image} of ${words} words from the image`, `LLR ${number(row.llr)} per word`, `ln P ${number(row.logp)} per token`];
    if (!most) parts.shift();
    if (unlikely > 1) parts.unshift(`${unlikely} words that this model would not have said`);
    const [all, odd, dull] = row.sentences;
    if (all > 1 && odd) parts.push(`${odd} of ${all} sentences with such words`);
    if (all > 1 && dull) parts.push(`${dull} of ${all} sentences from habit`);
    if (row.bound) parts.push("surprise at most");
    ref("scores").textContent = parts.join(" · ");
    return made;
  }

  function grow() {
    const next = state.list.slice(state.shown, state.shown + CHUNK);
    const fragment = document.createDocumentFragment();
    for (const row of next) fragment.append(line(row));
    $("answers").append(fragment);
    state.shown += next.length;
    $("more").hidden = state.shown >= state.list.length;
  }

  const turned = () => (state.sort === "rank" ? ["worst first", "best first"] : ["lowest first", "highest first"])[+state.down];

  function draw() {
    const key = KEYS[state.sort];
    const turn = state.down ? -1 : 1;
    state.list = rows.filter((row) => (state.band === "all" || row.origin === state.band) && row.text.includes(state.find));
    state.list.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place; // not known: last either way
      const difference = typeof x === "string" ? order.compare(x, y) : x - y;
      return turn * difference || a.place - b.place;
    });
    state.shown = 0;
    $("answers").replaceChildren();
    grow();
    const all = state.list.length === rows.length;
    $("count").textContent = all ? `${rows.length} answers` : `${state.list.length} of ${rows.length} answers`;
  }

  for (const band of ["all", ...Object.keys(NAMES).filter((name) => rows.some((row) => row.origin === name))]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = NAMES[band] ?? "All";
    button.setAttribute("aria-pressed", String(band === "all"));
    button.addEventListener("click", () => {
      state.band = band;
      for (const other of $("bands").children) other.setAttribute("aria-pressed", String(other === button));
      draw();
    });
    $("bands").append(button);
  }
  for (const [text, instead, nats, place] of worst) {
    const button = document.createElement("button");
    button.type = "button";
    const word = document.createElement("b");
    word.textContent = text;
    const rather = document.createElement("span");
    rather.textContent = behind(nats ?? "beyond all numbers", instead);
    button.append(word, " ", rather);
    button.title = rows[place].question;
    button.addEventListener("click", () => {
      $("search").value = rows[place].source;
      state.find = `\n${rows[place].source.toLowerCase()}\n`; // this one, and not line 140 for line 14
      draw();
      $("search").scrollIntoView({ block: "center" });
    });
    const item = document.createElement("li");
    item.append(button);
    $("worst").append(item);
  }
  $("worst").hidden = !worst.length;
  $("worst-title").hidden = !worst.length;
  let waiting = 0;
  $("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.find = event.target.value.trim().toLowerCase();
      draw();
    }, 120);
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("sort").addEventListener("change", (event) => {
    state.sort = event.target.value;
    $("turn").textContent = turned();
    draw();
  });
  $("turn").addEventListener("click", () => {
    state.down = !state.down;
    $("turn").textContent = turned();
    $("turn").setAttribute("aria-pressed", String(state.down));
    draw();
  });
  const ahead = new IntersectionObserver(
    (seen) => {
      if (!seen.some((one) => one.isIntersecting)) return;
      grow();
      ahead.unobserve($("more")); // so that it is asked again where the new rows do not fill the window
      ahead.observe($("more"));
    },
    { rootMargin: "800px" },
  );
  ahead.observe($("more"));
  draw();
  document.documentElement.dataset.ready = "true";
})();
