"""The baseline of a replay: the picture that is shown where a mask takes the image away.

A baseline is a value. A replay has one for good; ``Replay.over`` and ``Replay.strengthened`` give views of the same
answer over another one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.images import BLUR_LADDER, ImagePath, PixelPath, make_baseline
from lvlm_probe.images.baselines import KINDS
from lvlm_probe.replaying.micro_batches import whole_pass

if TYPE_CHECKING:
    from lvlm_probe.replaying.replays import Replay

__all__ = ["BaselineLike", "baseline_identity", "baseline_log_probs", "over", "strengthened"]

BaselineLike = str | Image.Image | Sequence[str | Image.Image] | Mapping[str, Any]
"""A kind, a picture of the user's (one per image), or the description of a baseline (``replay.baseline``)."""

_PATHS_KEPT = 6
"""Baselines whose pixel inputs stay at hand: the ladder of blurs, and one or two besides."""


def baseline_identity(baseline: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the baseline of a description from all others; of a picture that the description does not tell from
    others, ``("image", None)``."""
    kind = baseline.get("kind", "blur")
    if kind == "image":
        return ("image", baseline.get("sha256"))
    if kind == "blur":
        strength = baseline.get("strength")
        # The limit of an ever stronger blur is the mean colour: by another name, the same picture.
        if baseline.get("limit") or (strength is not None and math.isinf(strength)):
            return ("mean", None)
        return ("blur", float(BLUR_LADDER[0] if strength is None else strength))
    return (kind, int(baseline.get("seed") or 0) if kind == "noise" else None)


def over(replay: Replay, baseline: Any, strength: float | None, seed: int | None) -> Replay:
    """``Replay.over``."""
    if isinstance(baseline, Mapping):
        if _same(baseline, replay.baseline):
            return replay
        kind = baseline.get("kind", "blur")
        if kind not in KINDS:
            raise ImageError(
                "this baseline was a picture of your own, which a description does not hold, and it is not the one "
                "that this replay has: give the picture again, as baseline=… or by replay.over(picture) (on the "
                "command line --baseline FILE)"
            )
        limit = baseline.get("limit")
        return over(replay, kind, math.inf if limit else baseline.get("strength"), baseline.get("seed"))
    params = {name: value for name, value in (("strength", strength), ("seed", seed)) if value is not None}
    kinds = list(baseline) if isinstance(baseline, Sequence) and not isinstance(baseline, str) else [baseline]
    if len(kinds) == 1:
        kinds *= replay.n_images
    if len(kinds) != replay.n_images:
        raise ImageError(
            f"{len(kinds)} baseline pictures for a prompt with {replay.n_images} images; give one per image"
        )
    plain = isinstance(kinds[0], str) and all(kind == kinds[0] for kind in kinds)
    if plain and kinds[0] in KINDS and _same({"kind": kinds[0], **params}, replay.baseline):
        return replay
    path, description = (_pixels if isinstance(replay.path, PixelPath) else _images)(replay, kinds, plain, params)
    return replay.viewed(path=path, baseline=description)


def strengthened(replay: Replay, steps: Sequence[int], below: float) -> Replay:
    """``Replay.strengthened``."""
    index = torch.as_tensor(list(steps), dtype=torch.long)
    if index.numel() == 0:
        return replay
    own = replay.baseline
    current = math.inf if own.get("limit") else float(own.get("strength") or 0.0)
    harder = [rung for rung in BLUR_LADDER if rung > current] if own.get("kind") == "blur" else []
    best: tuple[float, Replay] | None = None
    for rung in [None, *harder]:
        view = replay if rung is None else over(replay, "blur", rung, None)
        probability = float(view.baseline_log_probs[index].exp().mean())
        if best is None or probability < best[0]:
            best = probability, view
        if probability < below:
            break
    assert best is not None
    probability, view = best
    checked = {"mean_probability": probability, "verified": probability < below}
    return view.viewed(baseline={**view.baseline, **checked})


def baseline_log_probs(replay: Replay) -> torch.Tensor:
    """log P̃(a_t) on the baseline picture, ``(step,)``, computed once for all views over it."""
    known, identity = replay.kept.baseline_log_probs, baseline_identity(replay.baseline)
    if identity not in known or identity == ("image", None):
        with torch.no_grad():
            known[identity] = whole_pass(replay, lambda: replay.run_inputs(replay.path.baseline_inputs))[0].cpu()
    return known[identity].clone()


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    identity = baseline_identity(first)
    return identity == baseline_identity(second) and identity != ("image", None)


def _images(replay: Replay, kinds: list[Any], plain: bool, params: dict[str, Any]) -> tuple[ImagePath, dict[str, Any]]:
    path = replay.path
    assert isinstance(path, ImagePath)
    made = [make_baseline(picture, kind, **params) for picture, kind in zip(path.images, kinds, strict=True)]
    description: dict[str, Any] = {"kind": made[0].kind, **made[0].params}
    if not plain:
        digest = hashlib.sha256()
        for item in made:
            digest.update(repr((item.image.mode, item.image.size)).encode() + item.image.tobytes())
        description = {**description, "kind": "image", "sha256": digest.hexdigest()}
    return _cached(replay, description, lambda: path.with_baseline([item.image for item in made])), description


def _pixels(replay: Replay, kinds: list[Any], plain: bool, params: dict[str, Any]) -> tuple[PixelPath, dict[str, Any]]:
    path = replay.path
    assert isinstance(path, PixelPath)
    if not plain:
        raise ImageError(
            "masks live in pixel-input space here, where a picture of your own cannot be brought to without the image "
            f"processor: give the processor, or choose one of {', '.join(KINDS)}"
        )
    kind = str(kinds[0])
    made = _cached(replay, {"kind": kind, **params}, lambda: path.with_baseline_kind(kind, **params))
    return made, made.description


def _cached(replay: Replay, description: Mapping[str, Any], make: Any) -> Any:
    paths, identity = replay.kept.paths, baseline_identity(description)
    if identity not in paths:
        while len(paths) >= _PATHS_KEPT:
            paths.pop(next(iter(paths)))
        paths[identity] = make()
    return paths[identity]
