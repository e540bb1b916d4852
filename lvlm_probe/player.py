"""Replay: log P(answer | masked picture), the one differentiable function everything else is written on.

A mask says how much of the picture the model may see: 1 keeps a pixel, 0 puts the baseline picture there
(``Φ(I, Ĩ, M) = I ⊙ M + Ĩ ⊙ (1 − M)``, paper, Eq. 3). ``Replay.log_probs(mask)`` carries it through the processor's
geometry and the unmodified model to the log-probabilities of the recorded answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lvlm_probe.anatomy import examine
from lvlm_probe.chunks import Chunked, noise_like, noise_seeds
from lvlm_probe.errors import ImageError, ModelMismatch, OutOfMemory, ReplayError
from lvlm_probe.forcing import TeacherForcing
from lvlm_probe.identity import fingerprint
from lvlm_probe.images import BLUR_LADDER, PixelPath, make_baseline
from lvlm_probe.images.masks import expand_masks
from lvlm_probe.memory import masks_that_fit, saved_bytes
from lvlm_probe.recorded_path import LiveTrace, recorded_path
from lvlm_probe.words import Word, group_words

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.trace import Trace

__all__ = ["PassCounter", "Replay", "replay"]

_log = logging.getLogger("lvlm_probe")

Mode = Literal["fast", "exact"]
Score = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class PassCounter:
    """How many pictures went through the model, forward and backward."""

    forward: int = 0
    backward: int = 0


def replay(
    trace: Trace,
    model: torch.nn.Module,
    processor: object | None = None,
    *,
    strict: bool = True,
    gradient_checkpointing: bool = False,
    micro_batch: int | None = None,
) -> Replay:
    """Get ready to replay a recorded answer under masked pictures.

    Args:
        trace: what ``open_trace`` or a store gives.
        model: the model that was recorded, loaded again in any process.
        processor: its processor, or its image processor; without it masks live in pixel-input space.
        strict: refuse another model. ``False`` replays the answer on it all the same, e.g. to compare two models.
        gradient_checkpointing: trade time for memory in gradient passes.
        micro_batch: masks per forward pass; by default as many as fit.

    Raises:
        ModelMismatch: the fingerprint differs from the recorded one, or the processor makes other inputs.
        ImageError: the trace holds no picture a mask could cover.
        ProcessorRefused: masks cannot be carried through this processor.
    """
    recorded = str(trace.model.get("fingerprint", ""))
    if strict and recorded:
        present = fingerprint(model)
        if present != recorded:
            raise ModelMismatch(
                f"{trace.path.name} was recorded with {trace.model.get('class')} "
                f"{trace.model.get('model_id') or '(no name)'} (fingerprint {recorded[:12]}…), but this "
                f"{type(model).__name__} has fingerprint {present[:12]}…; load the recorded model, or pass "
                f"strict=False to replay the answer on another one"
            )
    return Replay(trace, model, processor, gradient_checkpointing=gradient_checkpointing, micro_batch=micro_batch)


class Replay:
    """One recorded answer on one live model. Made by ``lvlm_probe.replay``.

    Attributes:
        trace, trace_id: what is replayed.
        tokens, token_ids, special, words: the recorded answer, ``(T,)`` each but ``words``.
        path: how a mask reaches the model's pixel inputs.
        baseline: what the baseline picture is: ``kind``, its parameters, and, once checked, ``mean_probability``.
        passes: pictures sent through the model so far.
    """

    def __init__(
        self,
        trace: Trace | LiveTrace,
        model: torch.nn.Module,
        processor: object | None,
        *,
        gradient_checkpointing: bool = False,
        micro_batch: int | None = None,
        check_pixels: bool = True,
    ) -> None:
        self.trace = trace
        self.trace_id: str = trace.trace_id
        self.model = model
        self.tokens: list[str] = list(trace.tokens)
        self.token_ids = torch.tensor(trace.token_ids).long()
        self.special = torch.tensor(trace.special).bool()
        self.words: list[Word] = group_words(self.tokens, self.special.tolist())
        self.gradient_checkpointing = gradient_checkpointing
        self.passes = PassCounter()
        self._micro_batch = micro_batch
        self._bytes_per_mask: int | None = None
        self._original: torch.Tensor | None = None
        self._baseline_log_probs: torch.Tensor | None = None

        prompt = torch.tensor(trace.input_ids).long()
        recorded = {name: value for name, value in trace.model_kwargs.items() if isinstance(value, torch.Tensor)}
        self.path, self.baseline = recorded_path(trace, recorded, processor, model, check=check_pixels)
        anatomy = examine(model, processor)
        # One entry per prompt position, and not the picture's: such inputs are extended over the answer.
        sequence = {
            name: value
            for name, value in recorded.items()
            if value.ndim >= 2
            and value.shape[1] == prompt.numel()
            and name not in self.path.inputs
            and not anatomy.is_pixel_name(name)
        }
        self._fed = frozenset(recorded) - frozenset(sequence)
        others = {name: recorded[name] for name in self._fed if name not in self.path.inputs}
        self._forcing = TeacherForcing(
            model,
            input_ids=prompt,
            token_ids=self.token_ids,
            sequence_inputs=sequence,
            other_inputs=others,
            answer_token_type=anatomy.answer_token_type,
        )
        self.device = self._forcing.device

    # ------------------------------------------------------------------ the picture

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

    def baseline_image(self, k: int = 0) -> Image.Image | None:
        """Baseline of picture ``k``; ``None`` when masks live in pixel-input space."""
        images = self.path.baseline_images
        return images[k] if images else None

    def seen(self, k: int = 0, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Which pixels (or cells of a grid of ``shape``) of picture ``k`` reach the model, bool ``(row, col)``."""
        return self.path.seen(k, shape)

    def set_baseline(self, kind: str | Image.Image | Sequence[Image.Image] = "blur", **params: Any) -> dict[str, Any]:
        """Choose the baseline picture Ĩ.

        Args:
            kind: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or the user's own picture (one per image).
            params: ``strength`` (blur: sigma as a share of the long side), ``seed`` (noise).

        Returns:
            the description that provenance keeps; also in ``replay.baseline``.
        """
        kinds = list(kind) if isinstance(kind, Sequence) and not isinstance(kind, str) else [kind] * self.n_images
        if len(kinds) != self.n_images:
            raise ImageError(
                f"{len(kinds)} baseline pictures for a prompt with {self.n_images} images; give one per image"
            )
        if isinstance(self.path, PixelPath):
            self.path = self.path.with_baseline_kind(str(kinds[0]), **params)
            self.baseline = {"kind": str(kinds[0]), **params}
        else:
            made = [make_baseline(picture, k, **params) for picture, k in zip(self.path.images, kinds, strict=True)]
            self.path = self.path.with_baseline([item.image for item in made])
            self.baseline = {"kind": made[0].kind, **made[0].params}
        self._baseline_log_probs = None
        return self.baseline

    def strengthen(self, steps: Sequence[int], *, below: float = 0.05) -> dict[str, Any]:
        """Blur harder until the mean probability of the answer tokens ``steps`` is under ``below`` (paper, A.1).

        Only a blurred baseline is changed; of several that do not reach ``below`` the best is kept. The result says
        ``mean_probability`` and whether it is ``verified``.
        """
        index = torch.as_tensor(list(steps), dtype=torch.long)
        if index.numel() == 0:
            return self.baseline
        best: tuple[float, dict[str, Any], Any, torch.Tensor] | None = None
        current = math.inf if self.baseline.get("limit") else float(self.baseline.get("strength") or 0.0)
        harder = [rung for rung in BLUR_LADDER if rung > current] if self.baseline.get("kind") == "blur" else []
        for rung in [None, *harder]:
            if rung is not None:
                self.set_baseline("blur", strength=rung)
            probability = float(self.baseline_log_probs[index].exp().mean())
            if best is None or probability < best[0]:
                best = (probability, dict(self.baseline), self.path, self.baseline_log_probs)
            if probability < below:
                break
        assert best is not None
        probability, description, self.path, self._baseline_log_probs = best
        self.baseline = {**description, "mean_probability": probability, "verified": probability < below}
        return self.baseline

    # ------------------------------------------------------------------ the function

    @property
    def original_log_probs(self) -> torch.Tensor:
        """Replayed log P(a_t) on the whole picture, ``(step,)`` float32 on the CPU. Paper, Eq. 1."""
        if self._original is None:
            self._original = self.log_probs(None)[0].cpu()
        return self._original

    @property
    def baseline_log_probs(self) -> torch.Tensor:
        """Replayed log P̃(a_t) on the baseline picture, ``(step,)`` float32 on the CPU."""
        if self._baseline_log_probs is None:
            with torch.no_grad():
                self._baseline_log_probs = self._run(self.path.baseline_inputs, 1)[0].cpu()
        return self._baseline_log_probs

    @property
    def llr(self) -> torch.Tensor:
        """Log-likelihood ratio per token, ``(step,)`` nats. Paper, Eq. 6."""
        return self.original_log_probs - self.baseline_log_probs

    def log_probs(
        self,
        mask: torch.Tensor | None = None,
        *,
        image: int | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        mode: Mode = "fast",
        micro_batch: int | None = None,
    ) -> torch.Tensor:
        """log P(a_t) under masked pictures.

        Args:
            mask: ``(batch, row, col)`` or ``(row, col)`` in [0, 1], 1 = keep; several images: ``(batch, image, row,
                col)``. ``None`` is the whole picture.
            image: mask this picture only and leave the others whole.
            noise: standard deviation of Gaussian noise added to the normalised pixel inputs, fresh for every mask.
            generator: source of the noise; the global random state is never touched.
            mode: ``"exact"`` runs the real processor on the real composite (gradient from the traced geometry).
            micro_batch: masks per forward pass, by default as many as fit.

        Returns:
            ``(batch, step)`` float32, natural log, with gradient to ``mask`` when it is enabled. Paper, Eq. 1 and 3.

        Raises:
            MaskError: wrong shape, type or range.
            OutOfMemory: not even one mask fits.
        """
        if mask is None:
            with torch.no_grad():
                return self._run(self.path.inputs, 1)
        masks = self._batch_of(mask, image)
        seeds = noise_seeds(len(masks), noise, generator)
        size = micro_batch or self._fit(masks, image)
        differentiable = torch.is_grad_enabled() and masks.requires_grad
        if differentiable and len(masks) > size:
            return Chunked.apply(masks, self, image, noise, seeds, mode, size)
        with torch.set_grad_enabled(differentiable):
            return self._in_chunks(
                masks, size, lambda chunk, part: self._forward(chunk, image, noise, seeds[part], mode)
            )

    def score_and_grad(
        self,
        mask: torch.Tensor,
        score: Score,
        *,
        image: int | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score every mask and differentiate, one micro-batch at a time: memory of one, no recomputation.

        Args:
            mask: as for ``log_probs``; need not require a gradient.
            score: log-probabilities ``(batch, step)`` to scores ``(batch,)``; row i may depend on row i only.
            image, noise, generator: as for ``log_probs``.

        Returns:
            scores ``(batch,)`` and the gradient of each mask's own score to that mask, shaped like ``mask``.
        """
        masks = self._batch_of(mask, image).detach()
        seeds = noise_seeds(len(masks), noise, generator)
        size = self._micro_batch or self._fit(masks, image)

        def one(chunk: torch.Tensor, part: slice) -> torch.Tensor:
            leaf = chunk.detach().requires_grad_(True)
            with torch.enable_grad():
                scores = score(self._forward(leaf, image, noise, seeds[part], "fast"))
            if scores.shape != (len(chunk),):
                raise ReplayError(
                    f"score() must return one number per mask, ({len(chunk)},), not {tuple(scores.shape)}"
                )
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
            self.passes.backward += len(chunk)
            packed = torch.cat([scores.detach().to(gradient)[:, None], gradient.flatten(1)], dim=1)
            return packed

        packed = self._in_chunks(masks, size, one)
        return packed[:, 0], packed[:, 1:].reshape(mask.shape if mask.ndim > 2 else masks.shape).to(mask.dtype)

    # ------------------------------------------------------------------ inside

    def _run(self, pixel_inputs: dict[str, torch.Tensor], batch: int) -> torch.Tensor:
        fed = {name: value for name, value in pixel_inputs.items() if name in self._fed}
        checkpoint = self.gradient_checkpointing and torch.is_grad_enabled()
        self.passes.forward += batch
        return self._forcing.log_probs(fed, batch=batch, checkpoint=checkpoint)

    def _forward(
        self, masks: torch.Tensor, image: int | None, noise: float, seeds: torch.Tensor, mode: Mode
    ) -> torch.Tensor:
        inputs = self.path.apply(masks, image=image, mode=mode)
        if noise:
            for name in self.path.pixel_keys:
                inputs[name] = inputs[name] + noise_like(inputs[name], noise, seeds)
        return self._run(inputs, len(masks))

    def _in_chunks(
        self, masks: torch.Tensor, size: int, run: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        """``run`` over micro-batches of equal size; halves the size and goes on when memory runs out."""
        results: list[torch.Tensor] = []
        start = 0
        while start < len(masks):
            rest = len(masks) - start
            count = math.ceil(rest / math.ceil(rest / size))
            part = slice(start, start + count)
            try:
                results.append(run(masks[part], part))
            except (torch.OutOfMemoryError, MemoryError) as error:
                if count == 1:
                    raise OutOfMemory(
                        f"one mask on {self.trace_id} does not fit into memory of {self.device} ({error}); replay with "
                        f"gradient_checkpointing=True, load the model in bfloat16, or use a smaller image"
                    ) from error
                size = count // 2
                _log.warning("out of memory with %d masks at once; going on with %d", count, size)
                self._micro_batch = size
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += count
        return results[0] if len(results) == 1 else torch.cat(results)

    def _batch_of(self, mask: torch.Tensor, image: int | None) -> torch.Tensor:
        """The mask as a batch, checked before anything is computed."""
        masks = mask[None] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else mask
        expand_masks(masks, self.n_images, image)
        return masks

    def _fit(self, masks: torch.Tensor, image: int | None) -> int:
        if self._micro_batch is not None:
            return self._micro_batch
        if len(masks) == 1:
            return 1
        if self._bytes_per_mask is None:
            with torch.enable_grad():
                probe = masks[:1].detach().requires_grad_(True)
                self._bytes_per_mask = saved_bytes(
                    lambda: self._forward(probe, image, 0.0, noise_seeds(1, 0.0, None), "fast"),
                    besides=self.model.parameters(),
                )
        return masks_that_fit(self._bytes_per_mask, self.device)
