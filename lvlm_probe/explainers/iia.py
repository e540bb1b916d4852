"""IIA, iterated integrated attributions (Barkan et al., 2023): attention relevance averaged along paths.

``variant="paper"`` is how the paper describes it: n images r·I + (1 − r)·Ĩ, r = 0 … 1, gradients of the attention
averaged over them, then T-MM with the attention on the whole image. ``variant="iia2"`` is the algorithm of the
method's authors: the path starts at a black image, along it the attention of the last layer alone (of the encoder:
the last that the language model reads) is scaled from 0 to 1, ReLU(dA ⊙ A) is averaged over all points of both paths,
and the layers are joined by rollout, (Ā + I) / rowsum.

All points go through the model as one batch, because the relevance of a layer needs their average before it can be
carried to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lvlm_probe.attention import TapLayer
from lvlm_probe.errors import ExplainError, OutOfMemory
from lvlm_probe.explainers.attention_relevance import Scope, Walk, parts_of
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import finish
from lvlm_probe.models.exhaustion import out_of_memory
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer

_TOO_MANY = "the {} points of the path do not fit into memory at once; give points=…"


def _cost(_problem: Problem, params: Mapping[str, Any]) -> Cost:
    paper = params["variant"] == "paper"
    points = params["points"] or (11 if paper else 6)
    batch = points if paper else points * points
    passes = batch + int(not paper and params["scope"] == "encoder")
    return Cost("relevance", passes, passes, (batch,), splits=False, parts=parts_of(params["scope"]), joined=paper)


@register("iia", needs=("passes", "gradients", "attention"), cost=_cost, clips=True)
def iia(
    problem: Problem,
    *,
    variant: Literal["paper", "iia2"] = "paper",
    points: int | None = None,
    scope: Scope = "decoder",
    last_factor: Literal["identity", "bare"] = "identity",
    encoder: int | str = 0,
    size: int | tuple[int, int] | None = None,
) -> Outcome:
    """Explains by IIA. ``points`` passes forward and backward (their square with ``"iia2"``), in one batch; one more
    for the encoder's last layer with ``"iia2"`` and ``scope="encoder"``.

    Args:
        variant: See the module.
        points: Points of the path, both ends included: 11 for ``"paper"``, 6 for ``"iia2"`` (of either path).
        scope, last_factor, encoder, size: As for ``tmm``; ``last_factor`` for ``"paper"`` only.

    Raises:
        ExplainError: The model's attention cannot be read, the places of its tokens are not known, its encoder joins
            the images of a batch to one sequence, or the points did not stay in one batch.
        OutOfMemory: The points do not fit into memory at once.
    """
    count = points if points is not None else (11 if variant == "paper" else 6)
    blend, scale = _path(variant, count, last_factor)
    batch = len(blend)
    scaled: list[str] = []
    scales: dict[torch.device, Tensor] = {}

    def per_point(layer: AttentionLayer, value: Tensor) -> Tensor:
        """``(point * view, head, row, key)`` → ``(point, view, head, row, key)``."""
        if layer.batch % batch:
            if len(replay.limits.recovered) > recovered:
                raise OutOfMemory(too_many)
            raise ExplainError(
                f"the {batch} points of the path did not stay in one batch; give fewer points than {count}"
            )
        return value.reshape(batch, layer.batch // batch, *value.shape[1:])

    def bar(layer: AttentionLayer, rows: Tensor) -> Tensor:
        if scale is None:
            gradient = per_point(layer, layer.weight_gradient(rows)).mean(dim=0)
            product = (gradient * per_point(layer, layer.weights(rows))[-1]).clamp_(min=0)
            return product.mean(dim=1, dtype=sum_dtype(layer.device))
        product = per_point(layer, layer.weights(rows)) * per_point(layer, layer.weight_gradient(rows))
        if layer.layer.module in scaled:
            scales[layer.device] = scales.get(layer.device, scale).to(layer.device)
            product *= scales[layer.device][:, None, None, None, None]
        return product.clamp_(min=0).mean(dim=(0, 2), dtype=sum_dtype(layer.device))

    def scale_last(layer: TapLayer, output: Tensor) -> Tensor:
        if scale is None or layer.module not in scaled:
            return output
        factor = scale.to(output).repeat_interleave(output.shape[0] // batch)
        return output * factor.reshape(-1, *[1] * (output.ndim - 1))

    walk = Walk(problem, scope, bar, normalised=variant == "iia2", last_factor=last_factor, encoder=encoder)
    _check_batched(walk)
    replay = problem.replay.over("blank") if variant == "iia2" else problem.replay
    recovered, too_many = len(replay.limits.recovered), _TOO_MANY.format(batch)
    if variant == "iia2" and scope == "encoder":
        scaled += _last_read(problem, walk.lowest_part)
    with replay.capture(attention=walk.parts, visit=walk, edit=scale_last if scale is not None else None) as seen:
        walk.starts_at(next(iter(seen.tapped.get(walk.lowest_part, [])), ""))
        if scope != "encoder":
            scaled += seen.tapped.get("decoder", [])[-1:]
        try:
            replay.score_and_grad(problem.even(blend), problem.score, image=problem.target, micro_batch=batch)
        except (torch.OutOfMemoryError, MemoryError, OutOfMemory) as error:
            raise out_of_memory(too_many, error) from error
    problem.advance(1, 1)
    grid, met = walk.painted(size)
    params: dict[str, Any] = {"variant": variant, "points": count, "scope": scope, "encoder": encoder}
    params |= {"last_factor": last_factor, "size": list(grid.shape)}
    return finish(grid, met, params, diagnostics={"layers": walk.layers, "unreadable": dict(seen.unreadable)})


def _check_batched(walk: Walk) -> None:
    if walk.encoder_tokens is not None and len(walk.encoder_tokens.shape) == 1:
        raise ExplainError(
            f"{walk.encoder_tokens.encoder} joins all images of a batch to one sequence, so the points of the path "
            f"cannot be told apart in it; give scope='decoder', or use 'tmm', which goes through this encoder"
        )


def _path(variant: str, count: int, last_factor: str) -> tuple[Tensor, Tensor | None]:
    """The points: how much of the image is there, and by what the last layer's output is scaled. Raises
    ``ExplainError``."""
    if variant not in ("paper", "iia2"):
        raise ExplainError(f"variant is 'paper' or 'iia2'; got {variant!r}")
    if count < 2:
        raise ExplainError(f"points is at least 2, both ends of the path; got {count}")
    path = torch.linspace(0, 1, count, dtype=torch.float32)
    if variant == "paper":
        return path, None
    if last_factor != "identity":
        raise ExplainError("last_factor belongs to variant='paper'; 'iia2' joins its layers by rollout")
    return path.repeat_interleave(count), path.repeat(count)


def _last_read(problem: Problem, encoder: str) -> list[str]:
    """The encoder's last attention layer that the score depends on: where a backward pass arrives first."""
    arrived: list[str] = []

    def arrive(layer: AttentionLayer) -> None:
        if layer.part == encoder:
            arrived.append(layer.layer.module)

    with problem.replay.capture(attention=["encoder"], visit=arrive):
        problem.replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    return arrived[:1]
