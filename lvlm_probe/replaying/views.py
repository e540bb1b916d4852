"""What a replay says of its answer, and its views: the same answer over another baseline, with a counter of its own.

A replay is a value: no call changes it. A view is another object that shares what has been computed (``Kept``), of the
model as it is: of one that has changed nothing is kept.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from lvlm_probe.errors import ImageError, ReplayError
from lvlm_probe.images import BLUR_LADDER
from lvlm_probe.images.baselines import CLIP_KINDS, KINDS
from lvlm_probe.kinds import indices_of
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.replaying.baselines import BaselineLike, Path, baseline_identity, described, draw, same_baseline
from lvlm_probe.replaying.isolation import outside_modes, taking_turns
from lvlm_probe.replaying.micro_batches import PassCounter
from lvlm_probe.replaying.own_scores import OwnScore
from lvlm_probe.replaying.shortcuts import Shortcuts
from lvlm_probe.replaying.teacher_forcing import TeacherForcing
from lvlm_probe.words import Word, group_words

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.trace.clips import Clip


@dataclass
class Kept:
    """Results that the views of one replay share: none depends on what ran first.

    Attributes:
        original, rounding: log P(a_t) on the whole image, and how far rounding may move it.
        likeliest, runners_up: what was likeliest in the place of each token, and its log P; of all, and of all others.
        baseline_log_probs, paths: by ``baseline_identity``: log P̃(a_t), and pixel inputs.
        gradients: what is wrong with gradients; ``None`` before they were looked at.
        masks_at_once: masks per pass, by the rule.
        scored: of views with a score of the user's own, those asked for last at the end: results of theirs, their
            teacher-forced pass, and its shortcuts.
        facts: what others find out about this answer on this model, by a key of theirs.
        changes: how often the model had changed (``Replica.changes``), and what passes were cast to by the caller, when
            they were found.
    """

    original: torch.Tensor | None = None
    rounding: torch.Tensor | None = None
    likeliest: tuple[torch.Tensor, torch.Tensor] | None = None
    runners_up: tuple[torch.Tensor, torch.Tensor] | None = None
    baseline_log_probs: dict[Any, torch.Tensor] = field(default_factory=dict)
    paths: OrderedDict[Any, Path] = field(default_factory=OrderedDict)
    gradients: str | None = None
    masks_at_once: int | None = None
    scored: OrderedDict[OwnScore, tuple[Kept, TeacherForcing, Shortcuts]] = field(default_factory=OrderedDict)
    facts: dict[Any, Any] = field(default_factory=dict)
    changes: tuple[int, torch.dtype | None] = (0, None)

    def of(self, changes: tuple[int, torch.dtype | None]) -> Kept:
        """These results; of a model that has changed since, or computes otherwise, none, over the same pixel inputs."""
        if changes != self.changes:
            vars(self).update(vars(self.anew(changes=changes)))
        return self

    def anew(self, **known: Any) -> Kept:
        """No results but ``known`` ones, over the same pixel inputs: those of another question on the same model."""
        return Kept(**{"paths": self.paths, "changes": self.changes, **known})


class OnItsModel:
    """What holds a model: a copy of it, deep or not, is on the same model, and it goes to no other process."""

    _called: ClassVar[str]
    _instead: ClassVar[str]

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

    def __reduce__(self) -> Any:
        raise ReplayError(
            f"{self._called} holds its model and cannot be pickled or sent to another process: send {self._instead}"
        )


class Views(OnItsModel):
    """A recorded answer, and views of it.

    Attributes:
        trace, trace_id: what is replayed.
        path: how a mask reaches the images, over this view's baseline.
        passes: images sent through the model so far.
        kept: what all views share.
        own: a score that is one more column of log-probabilities.
    """

    _called, _instead = "a replay", "its trace, and replay it there, probe.replay(trace, model, processor)"
    own: OwnScore | None = None
    path: Any
    _baseline: dict[str, Any]

    def __init__(self, trace: Any) -> None:
        self.trace, self.trace_id = trace, str(trace.trace_id)
        self._tokens = tuple(trace.tokens)
        self._token_ids = torch.tensor(trace.token_ids).long()
        self._special = torch.tensor(trace.special).bool()
        self._words = tuple(group_words(self._tokens, self._special.tolist()))
        self.passes, self.kept = PassCounter(), Kept()

    @property
    def tokens(self) -> list[str]:
        """The recorded answer's tokens as texts."""
        return list(self._tokens)

    @property
    def token_ids(self) -> torch.Tensor:
        """Their numbers, ``(step,)`` int64."""
        return self._token_ids.clone()

    @property
    def special(self) -> torch.Tensor:
        """Which of them are special, ``(step,)`` bool."""
        return self._special.clone()

    @property
    def words(self) -> list[Word]:
        """The words of the recorded answer as spans of tokens."""
        return list(self._words)

    @property
    def kept(self) -> Kept:
        """What all views share; nothing yet, where the model has changed since, or the caller's autocast."""
        return self._kept.of(self._changes)

    @kept.setter
    def kept(self, kept: Kept) -> None:
        self._kept = kept

    @property
    def _changes(self) -> tuple[int, torch.dtype | None]:
        """How often the model has changed, and what the caller's autocast has passes computed in."""
        return 0, None

    @property
    def columns(self) -> int:
        """Columns of log-probabilities: the answer's tokens, and a score of the user's own where there is one."""
        return len(self._token_ids) + (self.own is not None)

    def wanted(self, steps: Sequence[int]) -> tuple[int, ...]:
        """Steps in order, each once. Raises ``ReplayError`` where the answer has no such token."""
        found = indices_of(steps, self.columns)
        if found is None:
            raise ReplayError(f"steps are tokens 0 to {len(self._token_ids) - 1} of the answer; got {list(steps)}")
        return tuple(found)

    @property
    def original_log_probs(self) -> torch.Tensor:
        """log P(a_t) on the whole image, ``(step,)`` float32 on the CPU."""
        raise NotImplementedError

    def _on_baseline(self) -> torch.Tensor:
        """log P̃(a_t) by one pass over the baseline image, ``(step,)`` on the CPU."""
        raise NotImplementedError

    @property
    @taking_turns
    def baseline_log_probs(self) -> torch.Tensor:
        """log P̃(a_t) on the baseline image, ``(step,)`` float32 on the CPU."""
        known, identity = self.kept.baseline_log_probs, baseline_identity(self._baseline)
        if identity not in known or identity == ("image", None):
            known[identity] = self._on_baseline()
        return known[identity].clone()

    @property
    def n_images(self) -> int:
        """Number of images in the prompt."""
        return self.path.n_images

    @property
    def clips(self) -> tuple[Clip, ...]:
        """Which images are frames of videos, in order. ``image=`` takes a clip where it takes an image: a mask is then
        ``(batch, t, row, col)``, for any number of steps in time."""
        return tuple(self.trace.clips)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """``(width, height)`` of each image, pixels."""
        return list(self.path.image_sizes)

    def image(self, k: int = 0) -> Image.Image:
        """Image ``k`` as the user gave it, RGB; a copy."""
        return self.trace.images[k]

    def seen(self, k: int = 0, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Pixels (or cells of a grid of ``shape``) of image ``k`` that reach the model, bool ``(row, col)``."""
        return self.path.seen(k, shape)

    @property
    def baseline(self) -> dict[str, Any]:
        """Description of the baseline image, plain JSON: ``kind``, its parameters, ``sha256`` of an image of the
        user's, and, once checked, ``mean_probability``. ``over`` takes it."""
        return copy.deepcopy(self._baseline)

    def baseline_image(self, k: int = 0) -> Image.Image | None:
        """Baseline of image ``k``; ``None`` when masks live in pixel-input space."""
        images = self.path.baseline_images
        return images[k].copy() if images else None

    @property
    @outside_modes
    @told_out_of_memory
    def llr(self) -> torch.Tensor:
        """Log-likelihood ratio per token, ``(step,)`` nats. Paper, Eq. 6."""
        return self.original_log_probs - self.baseline_log_probs

    def viewed(self, *, path: Path | None = None, baseline: dict[str, Any] | None = None) -> Self:
        """A view over a baseline that is already drawn: ``path`` and the description of it."""
        other: Self = copy.copy(self)
        other.path = self.path if path is None else path
        other._baseline = self._baseline if baseline is None else dict(baseline)
        return other

    @taking_turns
    def over(self, baseline: BaselineLike = "blur", *, strength: float | None = None, seed: int | None = None) -> Self:
        """The same answer over another baseline image Ĩ, as a view; this replay stays what it is.

        Args:
            baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``; of a video also ``"first_frame"`` or
                ``"middle_frame"`` in the place of all frames, or ``"shuffled_frames"``; the user's own image (one per
                image); or the description of a baseline, such as a heatmap's ``provenance["baseline"]``.
            strength: of a blur: sigma as a share of the long side.
            seed: of noise, or of the order of frames.

        Raises:
            ImageError: there is no such baseline, or the description is of an image of the user's which this replay
                does not have.
        """
        if isinstance(baseline, Mapping):
            if same_baseline(baseline, self._baseline):
                return self
            baseline, strength, seed = described(baseline)
        params = {name: value for name, value in (("strength", strength), ("seed", seed)) if value is not None}
        kinds = list(baseline) if isinstance(baseline, Sequence) and not isinstance(baseline, str) else [baseline]
        if len(kinds) == 1:
            kinds *= self.n_images
        if len(kinds) != self.n_images:
            raise ImageError(
                f"{len(kinds)} baseline images for a prompt with {self.n_images} images; give one per image"
            )
        named = isinstance(kinds[0], str) and kinds[0] in (*KINDS, *CLIP_KINDS) and kinds == kinds[:1] * len(kinds)
        if named and same_baseline({"kind": kinds[0], **params}, self._baseline):
            return self
        clips = self.clips if kinds[0] in CLIP_KINDS else ()
        path, description = draw(self.path, kinds, params, self.kept.paths, clips)
        return self.viewed(path=path, baseline=description)

    @taking_turns
    def strengthened(self, steps: Sequence[int], *, below: float = 0.05) -> Self:
        """A view over a blur so strong that the mean probability of the answer tokens ``steps`` is under ``below``
        (paper, A.1).

        Only a blurred baseline is made stronger; of several that do not reach ``below`` the best is taken. The view's
        ``baseline`` says ``mean_probability`` and whether it is ``verified``.

        Raises:
            ReplayError: the answer has no such token, or ``below`` is no probability.
        """
        if not 0 <= below <= 1:
            raise ReplayError(f"below is a probability, 0 to 1; got {below!r}")
        if len(steps) == 0:
            return self
        index = torch.as_tensor(self.wanted(steps), dtype=torch.long)
        own = self._baseline
        current = math.inf if own.get("limit") else float(own.get("strength") or 0.0)
        harder = [rung for rung in BLUR_LADDER if rung > current] if own.get("kind") == "blur" else []
        best: tuple[float, Self] | None = None
        for rung in [None, *harder]:
            view = self if rung is None else self.over("blur", strength=rung)
            probability = float(view.baseline_log_probs[index].exp().mean())
            if best is None or probability < best[0]:
                best = probability, view
            if probability < below:
                break
        assert best is not None
        probability, view = best
        checked = {"mean_probability": probability, "verified": probability < below}
        return view.viewed(baseline={**view.baseline, **checked})

    def counted(self) -> Self:
        """A view whose ``passes`` start at 0; they count in this replay's too."""
        other = self.viewed()
        other.passes = PassCounter(within=self.passes)
        return other
