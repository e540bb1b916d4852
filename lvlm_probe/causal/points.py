"""Values at any point of one teacher-forced pass, by module path or operation, through nnsight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.anatomy import find_modules

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay


@naming_arguments
def points(replay: Replay, wanted: Sequence[str], *, mask: torch.Tensor | None = None) -> dict[str, Any]:
    """Outputs of modules and of operations inside their forward, in one pass over prompt and answer.

    ::

        first = "model.language_model.layers.0.self_attn"
        probe.causal.points(replay, [first, f"{first}::apply_rotary_pos_emb"])
        probe.causal.points(replay, [f"{first}::attention_interface::nn.functional.softmax"])  # under eager

    Args:
        wanted: each a module path or fnmatch pattern, then, after ``::``, the name of a call (or of an assigned
            variable) in its forward as the source writes it, and so on inside that call. ``name[1]`` is the second of
            several, in the order of the source.
        mask: ``(row, col)`` over the image, 1 = keep; by default the whole image.

    Returns:
        point, with patterns written out → value as the function returned it, tensors detached; of a module that runs
        several times, the first. Sequence axes hold prompt and answer, ``replay.prompt_length`` positions the prompt.

    Raises:
        PointNotFound: no such module or operation; the message names the closest ones.
        ExplainError: nnsight is not installed, several operations have that name, or the pass does not get there.
    """
    from lvlm_probe.causal import through_nnsight

    if isinstance(wanted, str):
        raise ExplainError(f"points are given as a list: [{wanted!r}]")
    if mask is not None and (mask.ndim != 2 or replay.n_images != 1):
        raise ExplainError(f"mask is (row, col) over the one image of the prompt; got {tuple(mask.shape)}")
    values: dict[str, Any] = {}

    def worker(name: str, envoy: Any, operations: list[str]) -> Callable[[], None]:
        path = name.split("::")[0]
        return lambda: values.__setitem__(name, _kept(through_nnsight.read_output(envoy, operations, path=path)))

    def forward() -> None:
        with torch.no_grad():
            replay.log_probs(mask)

    plan: dict[str, tuple[torch.nn.Module, list[str]]] = {}
    with replay.replica.use() as model:
        for point in wanted:
            pattern, *operations = point.split("::")
            for path, module in find_modules(model, pattern):
                plan["::".join([path, *operations])] = module, operations
        with through_nnsight.wrapped(model) as envoys:
            _look(model, envoys, plan, worker, forward)
    return {name: values[name] for name in plan}


def _look(
    model: torch.nn.Module,
    envoys: dict[int, Any],
    plan: dict[str, tuple[torch.nn.Module, list[str]]],
    worker: Callable[[str, Any, list[str]], Callable[[], None]],
    forward: Callable[[], None],
) -> None:
    from lvlm_probe.causal import through_nnsight

    for name, (module, operations) in plan.items():
        if operations:  # unknown names are found before anything runs
            through_nnsight.resolve(envoys[id(module)], operations[0], path=name.split("::")[0])
    workers = {name: worker(name, envoys[id(module)], operations) for name, (module, operations) in plan.items()}
    through_nnsight.run(envoys[id(model)], forward, workers)


def _kept(value: Any) -> Any:
    """The value with every tensor detached and copied, so that nothing later in the pass changes it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_kept(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
