"""log P(a_t) as the model computes it while it generates."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["StepLogProbs"]


class StepLogProbs:
    """Reads log P(a_t) off the model's own logits while it generates.

    The logits of one step are kept until the next step shows which token was chosen: one ``(batch, vocabulary)`` tensor
    at a time, and no synchronisation with the device.
    """

    def __init__(self) -> None:
        self._pending: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def __call__(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        logits = output.logits
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._pending is not None and ids is not None:
            self._take(ids[:, -1])
        last = logits[:, -1]
        # A view would keep the logits of the whole prompt alive where the model computes them.
        self._pending = last.clone() if logits.shape[1] > 1 else last

    def _take(self, chosen: torch.Tensor) -> None:
        assert self._pending is not None
        chosen = chosen.to(self._pending.device)
        scores = self._pending.float()
        self._values.append(scores.gather(-1, chosen[:, None])[:, 0] - scores.logsumexp(-1))
        self._chosen.append(chosen)

    def result(self, generated: torch.Tensor) -> torch.Tensor | None:
        """log P of the tokens ``generated`` ``(batch, step)``; ``None`` unless every step was seen with its token."""
        steps = generated.shape[1]
        if self._pending is not None and len(self._values) == steps - 1 and len(self._pending) == len(generated):
            self._take(generated[:, -1])
        self._pending = None
        if len(self._values) < steps:
            return None
        chosen = torch.stack(self._chosen[:steps], dim=1)
        if chosen.shape != generated.shape or not torch.equal(chosen, generated.to(chosen.device)):
            return None
        return torch.stack(self._values[:steps], dim=1).cpu()
