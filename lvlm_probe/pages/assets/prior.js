// The language-prior meter: which answers are shown, in which order. Rows are made as they are scrolled to, so that
// thousands of answers open at once; every string of the data becomes text, never markup.
(() => {
  "use strict";
  const CHUNK = 60;
  const NAMES = { habit: "From habit", mixed: "Mixed", picture: "From the image", unknown: "Not known" };
  const { rows, pictures } = JSON.parse(document.getElementById("data").textContent);
  rows.forEach((row, place) => {
    row.place = place;
    row.text = `${row.question}\n${row.answer}\n${row.id ?? ""}\n${row.source}`.toLowerCase();
  });
  const KEYS = {
    total: (row) => row.total,
    normalised: (row) => row.normalised,
    share: (row) => row.share,
    llr: (row) => row.llr,
    words: (row) => row.seen[0],
    place: (row) => row.source,
  };
  const $ = (id) => document.getElementById(id);
  const state = { band: "all", find: "", sort: "total", down: false, shown: 0, list: [] };
  const order = new Intl.Collator(undefined, { numeric: true });

  const percent = (value) => (value === null ? "–" : value < 0 ? "no drop" : `${(100 * value).toFixed(1)} %`);
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
    if (row.picture === null) ref("picture").removeAttribute("src");
    else ref("picture").src = pictures[row.picture];
    ref("question").textContent = row.question;
    const said = ref("said");
    for (const [before, text, llr] of row.words) {
      said.append(before);
      const word = document.createElement("span");
      word.className = wash(llr);
      word.textContent = text;
      word.title = `LLR ${number(llr)}`;
      said.append(word);
    }
    if (!row.words.length) said.textContent = row.answer;
    ref("facts").textContent = [row.id, row.source, row.baseline && `baseline ${row.baseline}`, row.elsewhere && "given elsewhere"]
      .filter(Boolean)
      .join(" · ");
    ref("dot").classList.add(`band-${row.band}`);
    ref("dot").title = NAMES[row.band];
    const without = row.drop !== null && row.drop < 0;
    ref("drop").textContent = without ? "likelier" : percent(row.drop);
    ref("drop").classList.toggle("without", without);
    ref("unit").textContent = without ? "without the image" : "drop";
    ref("fill").setAttribute("class", `band-${row.band}`);
    ref("fill").setAttribute("width", String(100 * Math.min(1, Math.max(0, row.drop ?? 0))));
    ref("scores").textContent =
      `${percent(row.normalised)} per token · ${row.seen[1]} of ${row.seen[0]} words from the image · ratio ${number(row.total)} nats, ${number(row.llr)} per word`;
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

  function draw() {
    const key = KEYS[state.sort];
    const turn = state.down ? -1 : 1;
    state.list = rows.filter((row) => (state.band === "all" || row.band === state.band) && row.text.includes(state.find));
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

  for (const band of ["all", ...Object.keys(NAMES).filter((name) => rows.some((row) => row.band === name))]) {
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
    draw();
  });
  $("turn").addEventListener("click", () => {
    state.down = !state.down;
    $("turn").textContent = state.down ? "highest first" : "lowest first";
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
