"""The words of an answer as a notebook widget: a click on a word shows its map, and makes it where it is missing.

An anywidget: Jupyter, Colab, VS Code and marimo run it. Images are drawn here, so that no map is shown without its
verdict; the script (``assets/widget.js``) only puts them on the page. Where a notebook is read without widgets (GitHub,
nbviewer), the same answer stands as HTML.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.cards import answer_html, card
from lvlm_probe.errors import ProbeError, ReportError
from lvlm_probe.extras import require
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics import Score
from lvlm_probe.pages.data_uris import data_uri, shrink
from lvlm_probe.pages.samples import verdict_of
from lvlm_probe.pages.shell import asset
from lvlm_probe.selection import word_llr
from lvlm_probe.words import Word, spelled

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

_SIDE = 640
Explained = Heatmap | tuple[Heatmap, Score | None]


@naming_arguments
def widget(
    trace: Trace,
    heats: Heatmap | Iterable[Heatmap] = (),
    *,
    scores: Score | Iterable[Score | None] | None = None,
    explain: Callable[[Word], Explained] | None = None,
) -> Any:
    """Show an answer in a notebook so that a click on a word shows its map.

    Needs ``pip install 'lvlm-probe[widget]'``.

    Args:
        trace: the recorded answer.
        heats: maps that are there already, of this answer's words; one of all its selected words is shown while no
            word is clicked.
        scores: what ``evaluate`` said of each, in the same order; without one a map says "not checked".
        explain: makes the map of a word that has none, ``lambda word: probe.explain(replay, tokens=(word.start,
            word.stop))``, or that map and its score. It is called when the word is clicked.

    Returns:
        an ``anywidget.AnyWidget``. Its traitlet ``word`` is the number of the word that is clicked, -1 for none
        (``observe`` it, or set it); ``heat`` and ``score`` are what is on show, ``heats`` all maps by the number of
        their word.

    Raises:
        ReportError: a map is of another answer, or there is not one score per map.
        ProbeError: anywidget is not installed.
    """
    given = [heats] if isinstance(heats, Heatmap) else list(heats)
    judged = [scores] if isinstance(scores, Score) else [None] * len(given) if scores is None else list(scores)
    if len(judged) != len(given):
        raise ReportError(
            f"widget() was given {len(given)} heatmaps but {len(judged)} scores: pass one for each, or None"
        )
    require("anywidget", extra="widget", purpose="a widget")
    return _kind()(trace, zip(given, judged, strict=True), explain)


class _Answer:
    """What an ``AnswerWidget`` does; what it is made of comes with anywidget (``_kind``)."""

    question: Any
    maps: Any
    word: Any
    status: Any
    observe: Any

    def __init__(
        self,
        trace: Trace,
        heats: Iterable[tuple[Heatmap, Score | None]],
        explain: Callable[[Word], Explained] | None,
    ) -> None:
        self.trace, self._explain = trace, explain
        self._words = trace.words
        self.heats: dict[int, Heatmap] = {}
        self.scores: dict[int, Score | None] = {}
        words, tail = answer_words(trace)
        picture = data_uri(shrink(trace.image, _SIDE)) if trace.images else ""
        beneath: Any = super()
        beneath.__init__(question=trace.question or trace.prompt, words=words, tail=tail, image=picture)
        for heat, score in heats:
            _check(trace, heat)
            self._keep(_word_of(self._words, heat), heat, score)
        self._shown({"new": -1})
        self.observe(self._shown, "word")

    def in_answer(self, proposal: Mapping[str, Any]) -> int:
        """A value for ``word``, checked."""
        import traitlets

        number = int(proposal["value"])
        if not -1 <= number < len(self._words):
            raise traitlets.TraitError(f"there is no word {number}: the answer has {len(self._words)} words, or -1")
        return number

    @property
    def heat(self) -> Heatmap | None:
        """The map on show."""
        return self.heats.get(self.word)

    @property
    def score(self) -> Score | None:
        """What ``evaluate`` said of it."""
        return self.scores.get(self.word)

    def _keep(self, number: int, heat: Heatmap, score: Score | None) -> None:
        self.heats[number], self.scores[number] = heat, score
        if heat.values is not None:
            self.maps = {**self.maps, str(number): data_uri(heat.preview(_SIDE, score=score))}

    def _shown(self, change: Mapping[str, Any]) -> None:
        number = int(change["new"])
        if number >= 0 and number not in self.heats and self._explain is not None:
            word = self._words[number]
            self.status = f"Explaining “{word.text}” …"
            try:
                found = self._explain(word)
                heat, score = found if isinstance(found, tuple) else (found, None)
                _check(self.trace, heat)
                self._keep(number, heat, score)
            except ProbeError as error:
                self.status = f"No map of “{word.text}”: {error}"
                return
            except BaseException as error:  # the notebook shows it, and the widget does not say that it goes on
                self.status = f"No map of “{word.text}”: {type(error).__name__}"
                raise
        self.status = self._said(number)

    def _said(self, number: int) -> str:
        heat = self.heats.get(number)
        if heat is None:
            if number < 0:
                return "Click a word to see where it came from." if self.heats or self._explain else ""
            return f"No map of “{self._words[number].text}” was given: widget(trace, heats, explain=…) makes it."
        verdict = verdict_of(heat, self.scores.get(number))
        return " ".join([f"{heat.method}, “{heat.selection.text}”. {verdict['title']}", *verdict["reasons"]])

    def _repr_mimebundle_(self, **options: Any) -> Any:
        beneath: Any = super()
        found = beneath._repr_mimebundle_(**options)
        data, more = found if isinstance(found, tuple) else (found, {})
        return {**(data or {}), "text/html": self._repr_html_()}, more

    def _repr_html_(self) -> str:
        """The answer where there are no widgets: its words, and the map on show."""
        heat = self.heat
        if heat is not None:
            return heat._repr_html_()
        llr = None if self.trace.llr is None else self.trace.llr.tolist()
        return card(self.question, answer_html(self.trace.tokens, self.trace.special.tolist(), llr=llr))


@functools.cache
def _kind() -> Any:
    """The class of the widget, which is made when one is wanted."""
    import anywidget
    import traitlets

    def synced(trait: Any) -> Any:
        return trait.tag(sync=True)

    return type(
        "AnswerWidget",
        (_Answer, anywidget.AnyWidget),
        {
            "__doc__": "See ``widget``.",
            "_esm": asset("widget.js"),
            "_css": asset("widget.css"),
            **{name: synced(traitlets.Unicode()) for name in ("question", "tail", "image", "status")},
            "words": synced(traitlets.List()),
            "maps": synced(traitlets.Dict()),
            "word": synced(traitlets.Int(-1)),
            "_checked": traitlets.validate("word")(_Answer.in_answer),
        },
    )


def answer_words(trace: Trace) -> tuple[list[dict[str, Any]], str]:
    """The words with their numbers as the script takes them, and the text after the last."""
    shown = ["" if flag else piece for piece, flag in zip(trace.tokens, trace.special, strict=True)]
    texts, tail = spelled(shown, trace.words)
    ratios: Sequence[float | None] = [None] * len(texts)
    if trace.llr is not None:
        ratios = [ratio if np.isfinite(ratio) else None for ratio in word_llr(trace.words, trace.llr)]
    found = []
    for word, (before, text), ratio in zip(trace.words, texts, ratios, strict=True):
        told = f"P {np.exp(trace.log_probs[word.start : word.stop].sum()):.2g}"
        told += "" if ratio is None else f", {ratio:+.2f} nats from the image"
        found.append({"text": text, "before": before, "llr": ratio, "told": told})
    return found, tail


def _check(trace: Trace, heat: object) -> None:
    """Raises ``ReportError`` for what is no heatmap of this trace."""
    if not isinstance(heat, Heatmap) or heat.provenance.get("trace_id") != trace.trace_id:
        raise ReportError(f"widget() shows heatmaps of its trace, {trace.trace_id}; got {heat!r:.200}")


def _word_of(words: Sequence[Word], heat: Heatmap) -> int:
    """The number of the one word that a map is of; -1 for one of several."""
    inside = [
        number for number, word in enumerate(words) if set(range(word.start, word.stop)) & set(heat.selection.indices)
    ]
    return inside[0] if len(inside) == 1 and heat.selection.rule != "llr" else -1
