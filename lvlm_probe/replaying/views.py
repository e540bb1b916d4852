"""Views of a replay: the same answer on the same model over another baseline, with other settings, counted apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from lvlm_probe.images import ImagePath, PixelPath
from lvlm_probe.replaying import baselines
from lvlm_probe.replaying.gradient_flow import require_gradients
from lvlm_probe.replaying.isolation import outside_inference_mode, taking_turns
from lvlm_probe.replaying.micro_batches import Limits

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.replaying.answer_source import LiveTrace
    from lvlm_probe.trace import Trace

__all__ = ["Kept", "PassCounter", "Views"]


@dataclass
class PassCounter:
    """How many pictures went through the model, forward and backward.

    ``within`` is a counter that counts along, e.g. the replay's for that of one explanation.
    """

    forward: int = 0
    backward: int = 0
    within: PassCounter | None = field(default=None, repr=False)

    def add(self, *, forward: int = 0, backward: int = 0) -> None:
        """Count pictures."""
        self.forward += forward
        self.backward += backward
        if self.within is not None:
            self.within.add(forward=forward, backward=backward)


@dataclass
class Kept:
    """What the views of one replay have computed and share: none of it depends on what ran first.

    Attributes:
        original, rounding: log P(a_t) on the whole picture, and how far rounding may move it.
        baseline_log_probs, paths: by ``baseline_identity``: log P̃(a_t), and pixel inputs.
        gradients: what is wrong with gradients; ``None`` before they were looked at.
        masks_at_once: masks per pass, by the rule.
        facts: what others find out about this answer on this model, by a key of theirs.
    """

    original: torch.Tensor | None = None
    rounding: torch.Tensor | None = None
    baseline_log_probs: dict[Any, torch.Tensor] = field(default_factory=dict)
    paths: dict[Any, Any] = field(default_factory=dict)
    gradients: str | None = None
    masks_at_once: int | None = None
    facts: dict[Any, Any] = field(default_factory=dict)


class Views:
    """The part of ``Replay`` that knows its pictures and its baseline, and gives views.

    Attributes:
        path: how a mask reaches the model's pixel inputs, over this view's baseline.
        limits, passes, kept: see ``Replay``.
    """

    trace: Trace | LiveTrace
    path: ImagePath | PixelPath
    passes: PassCounter
    limits: Limits
    kept: Kept
    inside: bool
    _baseline: dict[str, Any]

    @property
    def n_images(self) -> int:
        """Number of pictures in the prompt."""
        return self.path.n_images

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """``(width, height)`` of each picture, pixels."""
        return list(self.path.image_sizes)

    def image(self, k: int = 0) -> Image.Image:
        """Picture ``k`` as the user gave it, RGB."""
        return self.trace.images[k]

    def seen(self, k: int = 0, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Which pixels (or cells of a grid of ``shape``) of picture ``k`` reach the model, bool ``(row, col)``."""
        return self.path.seen(k, shape)

    @property
    def baseline(self) -> dict[str, Any]:
        """Description of the baseline picture, plain JSON: ``kind``, its parameters, ``sha256`` of a picture of the
        user's, and, once checked, ``mean_probability``. ``over`` takes it."""
        return dict(self._baseline)

    def baseline_image(self, k: int = 0) -> Image.Image | None:
        """Baseline of picture ``k``; ``None`` when masks live in pixel-input space."""
        images = self.path.baseline_images
        return images[k] if images else None

    @outside_inference_mode
    @taking_turns
    def over(
        self, baseline: baselines.BaselineLike = "blur", *, strength: float | None = None, seed: int | None = None
    ) -> Self:
        """The same answer over another baseline picture Ĩ, as a view; this replay stays what it is.

        Args:
            baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``; the user's own picture (one per image); or the
                description of a baseline, such as a heatmap's ``provenance["baseline"]``.
            strength: of a blur: sigma as a share of the long side.
            seed: of noise.

        Raises:
            ImageError: there is no such baseline, or the description is of a picture of the user's which this replay
                does not have.
        """
        return cast(Self, baselines.over(cast(Any, self), baseline, strength, seed))

    @outside_inference_mode
    @taking_turns
    def strengthened(self, steps: Sequence[int], *, below: float = 0.05) -> Self:
        """A view over a blur so strong that the mean probability of the answer tokens ``steps`` is under ``below``
        (paper, A.1).

        Only a blurred baseline is made stronger; of several that do not reach ``below`` the best is taken. The view's
        ``baseline`` says ``mean_probability`` and whether it is ``verified``.
        """
        return cast(Self, baselines.strengthened(cast(Any, self), steps, below))

    @outside_inference_mode
    @taking_turns
    def require_gradients(self) -> None:
        """Check, once for all views, that the score's gradient arrives at the picture whole.

        Raises:
            ExplainError: it does not; the message names the layer where it stops, and the methods that need none.
        """
        require_gradients(cast(Any, self))

    def with_settings(self, *, micro_batch: int | None = None, gradient_checkpointing: bool = False) -> Self:
        """A view whose passes are run in another way, as a plan says."""
        other = self.viewed()
        other.limits = Limits(micro_batch, gradient_checkpointing)
        return other

    def counted(self) -> Self:
        """A view whose ``passes`` start at 0; they count in this replay's too."""
        other = self.viewed()
        other.passes = PassCounter(within=self.passes)
        return other

    def viewed(self, *, path: ImagePath | PixelPath | None = None, baseline: dict[str, Any] | None = None) -> Self:
        """A view over a baseline that is already drawn: ``path`` and the description of it."""
        other = copy.copy(self)
        other.path = self.path if path is None else path
        other._baseline = self._baseline if baseline is None else dict(baseline)
        return other

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are run again in backward, as the user wanted."""
        return self.limits.gradient_checkpointing
