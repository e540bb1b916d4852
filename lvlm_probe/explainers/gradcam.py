"""Grad-CAM (Selvaraju et al., 2017) at the vision encoder's layer that the language model reads.

A are the outputs of that layer and y the log-likelihood of the selected tokens; w_c = mean over patches of ∂y/∂A_c, and
the map is ReLU(Σ_c w_c A_c). The layer is found, not assumed: the last block of the encoder whose output still has a
gradient (LLaVA-1.5 reads the last but one, so its last block has none), of a convolutional encoder its last stage.
Class tokens take no part, and each view (tile, crop) has weights of its own; all are pasted back where the processor
cut them from. Of several encoders each has a map, and the result is their mean.

Weights that are a mean over patches suit a network whose head takes such a mean. A language model reads every patch for
itself, so gradients of different patches differ in sign, and their mean says little about any of them.
``pooled=False`` gives each patch its own, Σ_c ∂y/∂A_c A_c (HiResCAM, Draelos and Carin, 2020). That is 0 in front of a
norm, which does not see the length of its input: where one follows the last block, it is read behind the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lvlm_probe.boxes.encoder_tokens import blocks_of, chosen_encoder, encoder_tokens, encoders_of, feature_map_boxes
from lvlm_probe.boxes.painting import have_extent, paint, pitch
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, Shape, register
from lvlm_probe.explainers.scores import Sign, check_rules, finish, sign_rule
from lvlm_probe.models.precision import sum_dtype


def weighted_activations(
    activations: Tensor, gradients: Tensor, live: Tensor, *, pooled: bool = True, sign: Sign = "positive"
) -> Tensor:
    """ReLU(Σ_c w_c A_c) with w_c the mean gradient over the live tokens of a view.

    Args:
        activations, gradients: ``(view, token, channel)``.
        live: ``(view, token)`` bool; the others are left out of the mean and get 0.
        pooled: ``False`` gives each token its own gradient in the place of the mean.
        sign: ``"positive"`` is the ReLU, ``"absolute"`` takes what speaks against the words as well.

    Returns:
        ``(view, token)`` float64. Selvaraju et al. (2017), Eq. 1 and 2.
    """
    kept = live.to(activations.device)[:, :, None]
    wide = sum_dtype(activations.device)
    weights = gradients.to(wide)
    if pooled:
        weights = (weights * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
    raw = (weights * activations.to(wide)).sum(dim=-1)
    return ((raw.abs() if sign == "absolute" else raw.clamp(min=0)) * kept[:, :, 0]).cpu().double()


@register(
    "gradcam", needs=("passes", "gradients", "activations"), cost=lambda *_: Cost("activations", 1, 1), clips=True
)
def gradcam(
    problem: Problem,
    *,
    layer: str | None = None,
    encoder: int | str | None = None,
    pooled: bool = True,
    sign: Sign = "positive",
    size: int | tuple[int, int] | None = None,
) -> Outcome:
    """Explains by Grad-CAM. One forward and one backward pass, and one for the places of the encoder's tokens.

    Args:
        layer: Path of the module to look at, in the encoder; by default the last block that the model reads.
        encoder: Number or name of the encoder where there are several (``chosen_encoder``); by default each has a map,
            scaled to 0..1, and the result is their mean; the maps themselves are in the diagnostics.
        pooled: Weights are means over patches, as in Grad-CAM; ``False`` gives each patch its own, see the module.
        sign: ``"positive"`` cuts what speaks against the words to 0, as Grad-CAM does; ``"absolute"`` takes it as well.
        size: Grid of the heatmap, by default the tokens' own (of the finest encoder).

    Raises:
        ExplainError: The model has no encoder, no gradient reaches it, or the places of its tokens are not known.
    """
    check_rules("gradcam", sign=sign_rule(sign))
    replay, size_of = problem.replay, problem.extent
    encoders = encoders_of(replay)
    if encoder is not None:
        encoders = (chosen_encoder(replay, encoder, encoders),)
    candidates = {path: (layer,) if layer else blocks_of(replay.model, path) for path in encoders}
    norms = {path: () if layer or pooled else _norms_behind(replay.model, path) for path in encoders}
    if layer:
        within = tuple(path for path in encoders if f"{layer}.".startswith(f"{path}."))
        if not within:
            raise ExplainError(f"layer={layer!r} is not in an encoder; those are {', '.join(encoders)}")
        encoders = within
    modules = [module for path in encoders for module in (*candidates[path], *norms[path])]
    with replay.capture(modules=modules) as seen:
        replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    problem.advance(1, 1)
    maps: list[tuple[Tensor, np.ndarray]] = []
    used: list[tuple[str, str]] = []
    for path in encoders:
        reached = [module for module in candidates[path] if module in seen.gradients]
        if not reached:
            if len(encoders) == 1:
                raise ExplainError(
                    f"no gradient of the score reaches {layer or path}: the model does not read it for this answer"
                )
            continue
        shape_of = {module: output.shape for module, output in seen.outputs.items() if module in seen.gradients}
        same = [norm for norm in norms[path] if shape_of.get(norm) == shape_of[reached[-1]]]
        module = (same or reached)[-1]
        given = _of_one_image(seen.outputs[module], seen.gradients[module], replay.rows)
        maps.append(_map(problem, path, module, *given, pooled=pooled, sign=sign))
        used.append((path, module))
    if not maps:
        raise ExplainError("no gradient of the score reaches any encoder")
    shape = _finest([boxes for _, boxes in maps], size_of) if size is None else problem.shape(size)
    painted = [paint(values, boxes, size_of, shape) for values, boxes in maps]
    layers = [module for _, module in used]
    params: dict[str, Any] = {"layer": layers if len(layers) > 1 else layers[0], "encoder": encoder}
    params |= {"pooled": pooled, "sign": sign, "size": list(shape)}
    if len(painted) == 1:
        return finish(*painted[0], params)
    scaled = [finish(grid, met, params).values for grid, met in painted]
    known = [value.double() for value in scaled if value is not None]
    if not known:
        return Outcome(None, params, reason="the method gives every region of the image the same value")
    met = torch.stack([met for _, met in painted]).any(dim=0)
    each = {
        path: None if value is None else np.round(value.numpy(), 4)
        for (path, _), value in zip(used, scaled, strict=True)
    }
    return finish(torch.stack(known).mean(dim=0), met, params, diagnostics={"encoders": each})


def _norms_behind(model: nn.Module, encoder: str) -> tuple[str, ...]:
    """Paths of an encoder's norms behind its last block, in order, but for those inside of other blocks."""
    last = f"{blocks_of(model, encoder)[-1]}."
    modules = list(model.get_submodule(encoder).named_modules(prefix=encoder))
    end = max(place for place, (path, _) in enumerate(modules) if f"{path}.".startswith(last))
    norms = [path for path, module in modules[end + 1 :] if "norm" in type(module).__name__.lower()]
    return tuple(path for path in norms if not any(part.isdecimal() for part in path.removeprefix(encoder).split(".")))


def _of_one_image(activations: Tensor, gradients: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Activations of an image that went through the model ``rows`` times at once, and the score's gradient to them."""
    if rows == 1:
        return activations, gradients
    axis = 0 if activations.shape[0] % rows == 0 else 1
    first = activations.chunk(rows, dim=axis)[0]
    return first, torch.stack(gradients.chunk(rows, dim=axis)).sum(dim=0)


def _map(
    problem: Problem, encoder: str, module: str, activations: Tensor, gradients: Tensor, *, pooled: bool, sign: Sign
) -> tuple[Tensor, np.ndarray]:
    """CAM of one encoder's layer: values and boxes of its live tokens."""
    if activations.ndim == 4:  # a convolutional stage, (view, channel, row, col)
        boxes = feature_map_boxes(problem.replay, module, activations, problem.target)
        activations, gradients = (part.flatten(2).transpose(1, 2) for part in (activations, gradients))
    else:
        boxes = encoder_tokens(problem.replay, encoder, problem.target).boxes
        activations, gradients = (part.reshape(-1, *part.shape[-2:]) for part in (activations, gradients))
    if activations.shape[0] * activations.shape[1] != len(boxes):
        raise ExplainError(
            f"{module} has {activations.shape[0]} × {activations.shape[1]} tokens where the encoder's first block has "
            f"{len(boxes)}: their places are not known; name another layer of {encoder}"
        )
    live = have_extent(boxes)
    among = torch.from_numpy(live).reshape(activations.shape[0], activations.shape[1])
    values = weighted_activations(activations, gradients, among, pooled=pooled, sign=sign)
    return values.reshape(-1)[torch.from_numpy(live)], boxes[live]


def _finest(boxes: Sequence[np.ndarray], size: tuple[int, ...]) -> Shape:
    return max((pitch(each, size) for each in boxes), key=math.prod)
