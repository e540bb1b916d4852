// The answer's words: their colours, their marks, their numbers. Every string reaches the page as text, never as HTML.

function wash(llr) {
  // 6 nats and beyond is full colour; the bend lets one nat be seen
  if (!known(llr)) return "";
  const strength = clamp(Math.abs(llr) / 6) ** 0.65;
  if (Math.abs(llr) < 0.05) return "";
  return llr > 0
    ? `rgb(238 104 32 / ${(0.7 * strength).toFixed(3)})`
    : `rgb(58 110 210 / ${(0.62 * strength).toFixed(3)})`;
}

/** The map that explains this word and as little else as possible; -1 when there is none. */
function mapOf(word) {
  let best = -1;
  sample().maps.forEach((map, i) => {
    if (!map.values || map.whole || !map.tokens.some((t) => word.tokens.includes(t))) return;
    const better =
      best < 0 ||
      map.tokens.length < sample().maps[best].tokens.length ||
      (map.tokens.length === sample().maps[best].tokens.length &&
        map.method === current().method &&
        sample().maps[best].method !== current().method);
    if (better) best = i;
  });
  return best;
}

function drawAnswer() {
  const { words, tokens, tail, answer } = sample();
  page.answer.replaceChildren();
  if (!words.length) {
    page.answer.textContent = answer || "(not known: the page was written without the trace)";
    page.answer.dir = "auto";
    return;
  }
  const length = answer.length;
  page.answer.classList.add(length > 700 ? "longer" : length > 220 ? "long" : "short");
  words.forEach((word, index) => {
    page.answer.append(word.before);
    const button = pressable({ className: "word", "data-word": index, "aria-describedby": "tip" }, () => chooseWord(index));
    word.tokens.forEach((t, position) => {
      const text = position ? tokens[t].text : tokens[t].text.trimStart();
      button.append(make("span", { textContent: text, "data-token": t }));
    });
    button.style.background = wash(word.llr);
    button.classList.toggle("mapped", mapOf(word) >= 0);
    button.addEventListener("pointerenter", () => showTip(button, word));
    button.addEventListener("pointerleave", hideTip);
    button.addEventListener("focus", () => showTip(button, word));
    button.addEventListener("blur", hideTip);
    page.answer.append(button);
  });
  page.answer.append(tail);
  page.answer.dir = "auto"; // last: browsers look at the words that are there by then
}

function markWords() {
  // underline what is explained, ring the word whose map is on show
  const map = current();
  for (const button of page.answer.querySelectorAll(".word")) {
    const word = sample().words[button.dataset.word];
    const own = !map.whole && word.tokens.some((t) => map.tokens.includes(t));
    button.setAttribute("aria-pressed", own);
    button.setAttribute(
      "aria-label",
      word.text + (sample().whole.some((t) => word.tokens.includes(t)) ? ", selected" : ""),
    );
    for (const piece of button.children)
      piece.classList.toggle("k", sample().whole.includes(Number(piece.dataset.token)));
  }
}

function chooseWord(index) {
  const word = sample().words[index],
    found = mapOf(word);
  if (found >= 0) {
    chooseMap(found);
    return;
  }
  const first = word.tokens[0],
    last = word.tokens[word.tokens.length - 1] + 1;
  page.hint.replaceChildren(
    `No map of “${word.text}” is in this report. To make one: `,
    make("code", { textContent: `probe.explain(replay, tokens=(${first}, ${last}))` }),
  );
}

function showTip(button, word) {
  const { tokens, alpha } = sample();
  const meter = (label, p, kind) => {
    const fill = make("i");
    fill.style.width = `${100 * clamp(p)}%`;
    return make(
      "div",
      { className: `meter ${kind}` },
      make("span", { textContent: label }),
      make("div", {}, fill),
      make("span", { textContent: percent(p) }),
    );
  };
  tip.replaceChildren(make("strong", { textContent: word.text, dir: "auto" }));
  if (known(word.p)) tip.append(meter("with image", word.p, "with"));
  if (known(word.p0)) tip.append(meter("without", word.p0, "without"));
  if (known(word.llr)) tip.append(make("p", { textContent: `LLR ${signed(word.llr)} nats: ${times(word.llr)}` }));
  else
    tip.append(
      make("p", {
        className: "faint",
        textContent: "The baseline pass was not recorded, so nothing is known of this word without the image.",
      }),
    );
  if (word.tokens.length > 1)
    tip.append(
      make("p", {
        className: "faint",
        textContent:
          "Pieces: " +
          word.tokens
            .map((t) => `“${tokens[t].text.trim()}”${known(tokens[t].llr) ? " " + signed(tokens[t].llr) : ""}`)
            .join(" · "),
      }),
    );
  const reason = word.tokens.map((t) => sample().skipped[t]).find(Boolean);
  const selected = word.tokens.some((t) => sample().whole.includes(t));
  const over = known(word.llr) && known(alpha) && word.llr > alpha;
  const why = reason
    ? `: ${reason}`
    : !known(alpha) || !known(word.llr)
      ? ""
      : over
        ? `: none of its pieces is over ${alpha} by itself`
        : `: not over ${alpha}`;
  tip.append(
    make("p", {
      className: "faint",
      textContent: selected ? "Selected: this word is explained." : `Not selected${why}.`,
    }),
  );
  tip.hidden = false;
  const box = button.getClientRects()[0],
    room = document.documentElement.clientWidth;
  tip.style.left = `${window.scrollX + clamp(box.left, 12, Math.max(12, room - tip.offsetWidth - 12))}px`;
  const above = box.bottom + tip.offsetHeight + 16 > window.innerHeight && box.top > tip.offsetHeight + 16;
  tip.style.top = `${window.scrollY + (above ? box.top - tip.offsetHeight - 8 : button.getBoundingClientRect().bottom + 8)}px`;
}
function hideTip() {
  tip.hidden = true;
}

const isWord = (word) => /[\p{L}\p{N}]/u.test(word.text); // rather than a bare full stop

function drawLead() {
  const { words, whole, llrKnown, alpha, rule } = sample();
  page.legend.hidden = !llrKnown;
  page.lead.replaceChildren();
  if (!words.length) return;
  const chosen = words.filter((word) => word.tokens.some((t) => whole.includes(t)));
  if (!chosen.length) {
    page.lead.textContent = "No word of this answer is selected: none depends on the image enough to be explained.";
    return;
  }
  if (!llrKnown) {
    page.lead.textContent =
      "The underlined words are explained. How much each depends on the image was not recorded.";
    return;
  }
  // A long answer names the words that depend on the image most, each once; a short one all, in reading order.
  const order = chosen.length > 6 ? [...chosen].sort((a, b) => b.llr - a.llr) : chosen;
  const named = [...new Set((order.some(isWord) ? order.filter(isWord) : order).map((word) => word.text))].slice(0, 6);
  named.forEach((text, i) => {
    if (i) page.lead.append(i === named.length - 1 && chosen.length <= 6 ? " and " : ", ");
    page.lead.append(make("b", { textContent: text, dir: "auto" }));
  });
  // A word of a larger ratio, none of whose pieces reaches the threshold, is not selected; nor is it the language's.
  const rest = words.filter((word) => isWord(word) && !chosen.includes(word) && !(word.llr > alpha)).length;
  page.lead.append(
    chosen.length > 6 ? ` and others, ${chosen.length} in all,` : "",
    rule === "llr" && known(alpha)
      ? ` ${chosen.length > 1 ? "come" : "comes"} from the image (LLR over ${alpha})`
      : ` ${chosen.length > 1 ? "are" : "is"} explained here`,
    rest > 0 && rule === "llr"
      ? `; ${rest > 1 ? `${rest} other words follow` : "one other word follows"} mostly from the language.`
      : ".",
  );
}
