"""What would it say without this region? The model is asked again, with the image changed where a map is high.

The answer is generated anew: greedily, by the model's own ``generate``, on its duplicate, which nobody else sees. The
region that is taken away is the baseline image there, as in deletion; one that is kept alone has the baseline around.

**The smallest region that flips the answer.** Cells are ranked by the map, as in deletion. Without the hottest 1, 2, 4,
8, … of them the model is asked until its explained words change; between that number and the one before it the least
is found by halving, and asked for itself: without the region the words are other ones, without its last cell they are
not. Answers need not change back and forth in step with the area, so a smaller flip between two numbers that were asked
may be missed. At most 2 log₂ n + 2 answers for n cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import ExplainError
from lvlm_probe.evidence.regions import first_that
from lvlm_probe.explainers.curve_points import curve_masks, rank
from lvlm_probe.explainers.explaining import Tokens, selected
from lvlm_probe.explainers.scores import check_rules, whole_rule
from lvlm_probe.files import record_of
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics.localization import as_mask, boxes_to_mask
from lvlm_probe.metrics.scoring import BaselineChoice, check_answer, over_baseline
from lvlm_probe.models.exhaustion import does_not_fit, ran_out, told_out_of_memory
from lvlm_probe.models.replica import duplicated
from lvlm_probe.models.tokenizers import display_pieces, special_flags, stops_of, tokenizer_of
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.words import Word, group_words, phrase_spans

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace.clips import Clip
    from lvlm_probe.video import ClipHeatmap

Place = float | Literal["smallest"] | np.ndarray | Sequence[Sequence[float]]
"""A share of the map's cells, the hottest first; the smallest region that flips; a mask; or boxes in pixels."""
_LEAST_TOKENS = 32


@dataclass(frozen=True, repr=False)
class Edit:
    """What the model says with a region of the image taken away, or kept alone.

    Attributes:
        kind: ``"remove"`` or ``"keep"``: whether the region was replaced by the baseline image, or all the rest.
        answer: what the model says then, without special tokens.
        original: what it said on the whole image.
        changes: (words, the words in their place) in order, ``""`` where there are none.
        flipped: the explained words are not said any more, or ``until`` holds.
        area: share of the image that was taken away or kept, 0 to 1.
        text: the explained words.
        cells: how many of the map's hottest cells that are; ``None`` of a region that was given.
        boxes: the given region, ``(left, top, right, bottom)`` in pixels; empty of one by the map.
        smallest: it was searched for: with one cell less the words stay. ``False`` where none flips the answer.
        answers: how many answers were generated for it; each sends one image through the model.
        steps: tokens generated in all of them.
        notes: sentences worth knowing.
        mask: ``(row, col)`` of what the model saw, 1 = image; not part of ``to_dict``.
    """

    __repr__, __eq__ = in_one_line, equal

    kind: Literal["remove", "keep"]
    answer: str
    original: str
    changes: tuple[tuple[str, str], ...]
    flipped: bool
    area: float
    text: str
    cells: int | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    smallest: bool = False
    answers: int = 0
    steps: int = 0
    notes: tuple[str, ...] = ()
    mask: np.ndarray | None = field(default=None, compare=False)

    @property
    def correction(self) -> float | None:
        """The area of the smallest region that flips the answer, of ``metrics.amcr``; ``None`` where none does."""
        return self.area if self.flipped else None

    @property
    def sentence(self) -> str:
        """It in one sentence: "Without this 6 % of the image it says “The star is blue.” (red → blue)."."""
        share = f"{100 * self.area:.2g} %" if 0 < self.area < 0.995 else "100 %" if self.area else "0 %"
        place = f"this {share} of the image"
        if self.smallest is False and self.cells is not None and self.area > 0.995 and self.kind == "remove":
            place = "all of the image"
        where = f"Without {place}" if self.kind == "remove" else f"With nothing but {place}"
        if not self.changes:
            return f"{where} it says the same."
        told = ", ".join(f"{before or 'nothing'} → {after or 'nothing'}" for before, after in self.changes)
        stays = "" if self.flipped else f", and still {self.text!r}"
        return f"{where} it says “{self.answer}” ({told}){stays}."

    def __str__(self) -> str:
        return self.sentence

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: everything but the mask."""
        return {**record_of(self, "mask"), "sentence": self.sentence}

    def attached(self, heat: Heatmap | ClipHeatmap) -> Heatmap | ClipHeatmap:
        """The heatmap with this in its provenance, ``["edits"]``, where ``write`` keeps it and ``report`` shows it; one
        of the same region is replaced."""
        own = self.to_dict()

        def place(record: Mapping[str, Any]) -> list[Any]:
            return [record.get(name) for name in ("kind", "smallest", "boxes")] + [
                None if self.smallest else record.get("area")
            ]

        kept = [one for one in heat.provenance.get("edits", ()) if place(one) != place(own)]
        return dataclasses.replace(heat, provenance={**heat.provenance, "edits": [*kept, own]})


@naming_arguments
@outside_modes
@told_out_of_memory
def edit(
    replay: Replay,
    heat: Heatmap | ClipHeatmap | None = None,
    *,
    remove: Place | None = None,
    keep: Place | None = None,
    until: Callable[[str], bool] | str | None = None,
    tokens: Tokens | None = None,
    image: int = 0,
    baseline: BaselineChoice | None = None,
    mode: Literal["fast", "exact"] = "fast",
    max_new_tokens: int | None = None,
    progress: ProgressChoice = None,
) -> Edit:
    """Ask the model again with a region of the image taken away, or kept alone.

    ::

        probe.edit(replay, heat)                                   # the smallest region that flips the answer
        probe.edit(replay, heat, keep=0.1)                         # the hottest tenth of the image alone
        probe.edit(replay, remove=[(40, 40, 120, 90)], tokens="red")   # a distractor

    Args:
        replay: the recorded answer on its model, which is asked again.
        heat: the map whose hottest cells are taken; not needed for a region of your own.
        remove: share of the image, by cells of the map, hottest first; ``"smallest"`` (where nothing is given), the
            smallest such region that flips the answer; or a region as for ``metrics.pointing_game``: boxes in pixels,
            or a mask ``(row, col)``.
        keep: the same of what is kept alone, all else being taken away.
        until: what counts as flipped: a word or phrase that the answer must hold, or a function of the answer; by
            default that it does not hold the explained words in their place any more.
        tokens: as for ``lvlm_probe.explain``; by default those of ``heat``.
        image: number of the image, where there is no ``heat``.
        baseline: what stands in the place of what is taken away; by default that of ``heat``, or the replay's.
        mode: ``"exact"`` sends real composites through the real processor.
        max_new_tokens: length of answers at most, tokens; by default twice that of the recorded one and at least 32,
            or, where that was cut, its own.
        progress: called with (done, most) answers; by default a bar where a person waits, ``False`` for none.

    Raises:
        ExplainError: heat and region do not go together, the model cannot be asked again, or without any change it does
            not say the words (the answer was sampled).
        OutOfMemory: the model cannot be asked in the memory there is.
        ReplayError: the model is another package's, whose call is not known.
    """
    kind, place = _asked(heat, remove, keep)
    if not isinstance(replay, Replay):
        raise ExplainError(
            "an answer is edited on the model itself, and this replay is one without it (a server, or a trace): replay "
            "the trace on the model, probe.replay(trace, model, processor)"
        )
    if heat is not None:
        check_answer(heat, replay)
        baseline = (heat.provenance.get("baseline") or replay.baseline) if baseline is None else baseline
    selection = selected(replay, tokens) if tokens is not None or heat is None else heat.selection
    if not selection.indices:
        raise ExplainError(f"there are no words to watch: {selection.reason or 'it is a score of no words'}")
    replay = replay if baseline is None else over_baseline(replay, baseline)
    target = image if heat is None else heat.target
    check_rules("edit", max_new_tokens=whole_rule(max_new_tokens, or_none=True))
    asking = _Asking(replay, selection, target, mode, max_new_tokens, until)
    if isinstance(place, str):
        assert heat is not None
        return _smallest(asking, heat, kind, progress)
    if isinstance(place, float):
        assert heat is not None
        assert heat.values is not None
        cells = min(max(1, round(place * heat.values.size)), _cells_of(heat))
        return asking.by_map(heat, cells, kind)
    region, boxes = place
    if region is None:
        assert isinstance(target, int)
        region = boxes_to_mask(boxes, replay.image_sizes[target])
    mask = torch.from_numpy(region == (kind == "keep")).float()
    return asking.edited(mask, kind=kind, area=float(region.mean()), boxes=boxes)


def _asked(heat: Any, remove: Place | None, keep: Place | None) -> tuple[Literal["remove", "keep"], Any]:
    """What is done, and where: ``"smallest"``, a share, or (mask or ``None``, boxes). Raises ``ExplainError``."""
    if remove is not None and keep is not None:
        raise ExplainError("remove= takes a region away and keep= takes away all but it: give one of them")
    kind: Literal["remove", "keep"] = "remove" if keep is None else "keep"
    place: Any = "smallest" if remove is keep is None else (remove if keep is None else keep)
    by_map = isinstance(place, (str, int, float))
    if by_map:
        known = place == "smallest" or (not isinstance(place, (str, bool)) and 0 < place <= 1)
    else:
        known = isinstance(place, (np.ndarray, Sequence))
    if not known:
        raise ExplainError(
            f"{kind} is a share of the image in (0, 1], 'smallest', boxes in pixels or a mask; got {place!r}"
        )
    if by_map:
        if heat is None:
            raise ExplainError("which cells are hottest is what a heatmap says: edit(replay, heat), or give boxes")
        heat.known_values()
        return kind, place if isinstance(place, str) else float(place)
    if heat is not None and heat.axes[0] == "t":
        raise ExplainError("a region of a video is taken by its map: give a share, or 'smallest'")
    if isinstance(place, np.ndarray):
        mask = as_mask(place, kind)
        if mask.ndim != 2 or not mask.any():
            raise ExplainError(f"a region is a mask (row, col) with something in it; got shape {place.shape}")
        return kind, (mask, ())
    single = len(place) == 4 and all(np.ndim(edge) == 0 for edge in place)
    boxes = tuple(tuple(map(float, box)) for box in ([place] if single else place))
    return kind, (None, boxes)


def mask_by_map(heat: Heatmap | ClipHeatmap, cells: int, kind: str) -> torch.Tensor:
    """The mask without the hottest cells, or with ``"keep"`` of nothing but them, on the map's grid."""
    assert heat.values is not None
    assert heat.seen is not None
    order = rank(heat.values, heat.seen, np.random.default_rng(0))
    return curve_masks(order, np.array([cells]), heat.values.shape, insert=kind == "keep")[0]


def _cells_of(heat: Heatmap | ClipHeatmap) -> int:
    """Cells that reach the model."""
    assert heat.seen is not None
    return int(heat.seen.sum())


def _smallest(
    asking: _Asking, heat: Heatmap | ClipHeatmap, kind: Literal["remove", "keep"], progress: ProgressChoice
) -> Edit:
    """The smallest region of the map that flips the answer: of one that is kept, the smallest that holds it."""
    seen = _cells_of(heat)
    most = 2 * seen.bit_length() + 2
    found: dict[int, Edit] = {}

    def at(cells: int) -> Edit:
        if cells not in found:
            found[cells] = asking.by_map(heat, cells, kind)
            if advance is not None:
                advance(len(found) + 1, most)
        return found[cells]

    def done(cells: int) -> bool:
        return at(cells).flipped == (kind == "remove")

    with show_progress(progress, "the smallest region that flips") as advance:
        cells = first_that(done, seen)
        one = at(cells or seen)
    return dataclasses.replace(one, smallest=cells is not None, answers=asking.answers, steps=asking.steps)


class _Asking:
    """The model, asked again and again; ``answers`` and ``steps`` count."""

    def __init__(
        self,
        replay: Replay,
        selection: TokenSelection,
        image: int | Clip,
        mode: Literal["fast", "exact"],
        max_new_tokens: int | None,
        until: Callable[[str], bool] | str | None,
    ) -> None:
        self._replay, self._selection, self._image, self._mode = replay, selection, image, mode
        self._until = until
        self._whole = replay.asked()
        self._model: Any = duplicated(replay.model)
        self._stops = stops_of(self._model, {}, replay.prompt_length)
        steps = len(replay.token_ids)
        ended = int(replay.token_ids[-1]) in self._stops.eos
        self._limit = max_new_tokens or (max(_LEAST_TOKENS, 2 * steps) if ended else steps)
        self.answers = self.steps = 0
        self._tokenizer = tokenizer_of(replay.processor)
        chosen = set(selection.indices)
        self._words = replay.words
        self._watched = {
            number
            for number, word in enumerate(replay.words)
            if not chosen.isdisjoint(range(word.start, word.stop))
        }  # fmt: skip
        self._original = _text(replay.tokens, replay.special.tolist())
        self.notes: tuple[str, ...] = ()
        self._check()

    def _check(self) -> None:
        """Ask about the whole image. Raises ``ExplainError`` where the words are not said even so."""
        answer, words = self._said(self._whole)
        changes, gone = _compared(self._words, words, self._watched)
        if not changes:
            return
        if gone or self._fulfilled(answer):
            raise ExplainError(
                f"asked again about the whole image, the model says {answer!r}, and the recorded answer is "
                f"{self._original!r}: the words to watch do not stand for a greedy answer on this model (it was "
                f"sampled, or generated under other settings); record it with do_sample=False"
            )
        self.notes = (f"asked again about the whole image, greedily, the model says {answer!r}",)

    def _fulfilled(self, answer: str) -> bool:
        if callable(self._until):
            return bool(self._until(answer))
        return self._until is not None and bool(phrase_spans(self._until, answer))

    def _said(self, inputs: Mapping[str, Any]) -> tuple[str, list[Word]]:
        """The greedy answer to these inputs, and its words."""
        settings = {"max_new_tokens": self._limit, "do_sample": False, "num_beams": 1}
        try:
            with torch.no_grad(), _without_sampling(self._model):
                output = self._model.generate(**inputs, **settings)
        except (TypeError, ValueError, IndexError, RuntimeError, MemoryError) as error:
            if ran_out(error):
                what = (
                    f"an answer of up to {self._limit} tokens does not fit into memory of {self._replay.device} beside "
                    f"the {self._replay.prompt_length} tokens of its prompt"
                )
                raise does_not_fit(what, error, "give a smaller max_new_tokens=…, or a smaller image") from error
            name = type(self._replay.model).__name__
            raise ExplainError(
                f"generate() of {name} cannot be called again with what the trace holds ({error}): ask it yourself, "
                "with attach(model, processor).masked(mask) around your own call"
            ) from error
        ids = (output if isinstance(output, torch.Tensor) else output.sequences)[0].cpu()
        start = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if start is not None and torch.equal(ids[: start.shape[1]], start[0].cpu()):
            ids = ids[start.shape[1] :]
        ids = ids[: self._stops.answer_length(ids.tolist())]
        self.answers, self.steps = self.answers + 1, self.steps + len(ids)
        self._replay.passes.add(forward=1)
        pieces = display_pieces(self._tokenizer, ids.tolist())
        special = special_flags(self._tokenizer, ids.tolist(), self._stops.eos)
        return _text(pieces, special), group_words(pieces, special)

    def by_map(self, heat: Heatmap | ClipHeatmap, cells: int, kind: Literal["remove", "keep"]) -> Edit:
        """What the model says without the hottest cells of a map, or with nothing but them."""
        assert heat.values is not None
        return self.edited(mask_by_map(heat, cells, kind), kind=kind, area=cells / heat.values.size, cells=cells)

    def edited(self, mask: torch.Tensor, **facts: Any) -> Edit:
        """What the model says under one mask."""
        inputs = self._replay.asked(mask[None].to(self._replay.device), image=self._image, mode=self._mode)
        answer, words = self._said(inputs)
        changes, gone = _compared(self._words, words, self._watched)
        return Edit(
            answer=answer,
            original=self._original,
            changes=changes,
            flipped=gone if self._until is None else self._fulfilled(answer),
            text=self._selection.text,
            answers=self.answers,
            steps=self.steps,
            notes=self.notes,
            mask=mask.numpy(),
            **facts,
        )


def _text(pieces: Sequence[str], special: Sequence[bool]) -> str:
    """An answer without special tokens."""
    return "".join(piece for piece, flag in zip(pieces, special, strict=True) if not flag).strip()


@contextlib.contextmanager
def _without_sampling(model: Any) -> Any:
    """Settings of sampling are of no use to a greedy answer, and transformers warns of each: they are left out."""
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    mine = type(config).from_dict(config.to_dict())
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        if hasattr(mine, name):
            setattr(mine, name, None)
    model.generation_config = mine
    try:
        yield
    finally:
        model.generation_config = config


def _compared(
    before: Sequence[Word], after: Sequence[Word], watched: set[int]
) -> tuple[tuple[tuple[str, str], ...], bool]:
    """Words that differ with those in their place, and whether a watched word is among them."""
    old, new = ([word.text for word in words] for words in (before, after))
    changes, gone = [], False
    for tag, start, stop, first, last in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        changes.append((" ".join(old[start:stop]), " ".join(new[first:last])))
        gone |= not watched.isdisjoint(range(start, stop))
    return tuple(changes), gone
