"""Teacher forcing: one pass over prompt and recorded answer that gives log P(a_t) at every step (paper, Eq. 1 and 5).

The answer's token t is predicted by the logits at position ``P + t - 1`` of the sequence ``prompt + answer[:-1]``
(P prompt tokens, t from 0), so one forward pass serves all steps and only those T positions go through the LM head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.hooks import HookSet

__all__ = ["OWN_PASS", "TeacherForcing", "checkpointed", "frozen", "input_device"]

OWN_PASS: ContextVar[bool] = ContextVar("lvlm_probe_own_pass", default=False)
"""True while a teacher-forced pass of ours runs, so that a mask on the user's own calls leaves it alone."""

# State that generate() leaves on a module for its own next call (M-RoPE offsets); a pass of ours must not disturb it.
_GENERATION_STATE = ("rope_deltas",)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Run ``model`` without side effects: eval mode, weights without gradients, generation state kept.

    Everything is put back on exit, also after an exception. Weights without ``requires_grad`` matter for memory too:
    autograd then saves nothing that only a weight gradient would need.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = [
        (module, name, vars(module)[name])
        for module in model.modules()
        for name in _GENERATION_STATE
        if name in vars(module)
    ]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module, name, _ in state:
            setattr(module, name, None)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, name, value in state:
            setattr(module, name, value)


@contextmanager
def checkpointed(model: torch.nn.Module, *, enabled: bool = True) -> Iterator[int]:
    """Gradient checkpointing that fires in eval mode, on exactly the layers that support it.

    transformers checkpoints a layer only while ``layer.training`` is set, so in eval mode its switch does nothing. Here
    the flag is set on the layer containers alone; their children (dropout among them) stay in eval mode, and the
    gradient is the same to the last bit.

    Yields:
        the number of layers that will be recomputed.

    Raises:
        ReplayError: a layer applies dropout by its own ``training`` flag, which would change the gradient.
    """
    if not enabled:
        yield 0
        return
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        rates = [value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]
        if any(rate > 0 for rate in rates):
            raise ReplayError(
                f"gradient checkpointing would change the gradient of {type(model).__name__}: {type(layer).__name__} "
                f"applies dropout by its own training flag; replay without gradient_checkpointing"
            )

    def recompute(function: Any, *args: Any) -> Any:
        # A partial of the layer's class function, or, before transformers 5.23, of its bound method.
        layer = function.args[0] if function.args else function.func.__self__

        # Frozen in the recomputation too: it runs in backward(), when the model's own flags are back in place.
        def forward(*inputs: Any) -> Any:
            with frozen(layer):
                return function(*inputs)

        return checkpoint(forward, *args, use_reentrant=False)

    names = ("gradient_checkpointing", "training", "_gradient_checkpointing_func")
    saved = [(layer, {name: vars(layer)[name] for name in names if name in vars(layer)}) for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(gradient_checkpointing=True, training=True, _gradient_checkpointing_func=recompute)
        yield len(layers)
    finally:
        for layer, before in saved:
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(before)


@contextmanager
def _own_pass() -> Iterator[None]:
    before = OWN_PASS.set(True)
    try:
        yield
    finally:
        OWN_PASS.reset(before)


class TeacherForcing:
    """The teacher-forced pass over one prompt and one answer, for any number of pictures at once.

    Args:
        model: the generating model; its mode, flags and state are left as they were.
        input_ids: ``(P,)`` prompt token ids without padding.
        token_ids: ``(T,)`` answer token ids, T >= 1.
        sequence_inputs: further inputs with one entry per prompt position, ``(1, P, ...)``; they are extended over the
            answer (token types by ``answer_token_type``, anything else by its last entry).
        other_inputs: inputs of any other shape, handed on as they are.
        answer_token_type: token type of the answer's tokens; text is 0 nearly everywhere.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        input_ids: torch.Tensor,
        token_ids: torch.Tensor,
        sequence_inputs: Mapping[str, torch.Tensor] | None = None,
        other_inputs: Mapping[str, Any] | None = None,
        answer_token_type: int = 0,
    ) -> None:
        if token_ids.numel() == 0:
            raise ReplayError("the answer has no tokens, so there is nothing to replay")
        self.model = model
        self.device = input_device(model)
        self.steps = int(token_ids.numel())
        self._targets = token_ids.to(self.device).long()
        ids = torch.cat([input_ids.long().cpu(), token_ids.long().cpu()[:-1]])
        self.length = int(ids.numel())
        self._sequence: dict[str, torch.Tensor] = {
            "input_ids": ids[None].to(self.device),
            "attention_mask": torch.ones(1, self.length, dtype=torch.long, device=self.device),
        }
        for name, value in (sequence_inputs or {}).items():
            if name not in self._sequence:
                self._sequence[name] = _extend(name, value, self.length, answer_token_type).to(self.device)
        self._other = dict(other_inputs or {})
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_use_cache = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def log_probs(
        self, pixel_inputs: Mapping[str, torch.Tensor], *, batch: int, checkpoint: bool = False
    ) -> torch.Tensor:
        """Log-probabilities of the answer's tokens for ``batch`` pictures.

        Args:
            pixel_inputs: the image inputs of ``batch`` copies of the prompt, concatenated along their first axis.
            batch: number of copies.
            checkpoint: recompute layers in backward instead of keeping their activations.

        Returns:
            ``(batch, step)`` float32 (float64 on a float64 model), natural log; differentiable in ``pixel_inputs`` when
            gradients are enabled.
            Paper, Eq. 1.
        """
        inputs: dict[str, Any] = {name: value.expand(batch, *value.shape[1:]) for name, value in self._sequence.items()}
        inputs.update(self._other)
        inputs.update({name: _to(value, self.device) for name, value in pixel_inputs.items()})
        if self._takes_use_cache:
            inputs["use_cache"] = False
        with (
            _own_pass(),
            frozen(self.model),
            checkpointed(self.model, enabled=checkpoint),
            self._last_positions_only() as extra,
        ):
            logits = self.model(**inputs, **extra, return_dict=True).logits
        logits = logits[:, -self.steps :]
        if logits.dtype != torch.float64:
            logits = logits.float()
        if logits.shape[0] != batch or logits.shape[1] != self.steps:
            raise ReplayError(
                f"{type(self.model).__name__} returned logits of shape {tuple(logits.shape)} for {batch} pictures and "
                f"{self.steps} answer tokens; its forward edits the sequence, so this answer cannot be replayed"
            )
        picked = logits.gather(-1, self._targets.to(logits.device)[None, :, None].expand(batch, -1, 1)).squeeze(-1)
        return picked - logits.logsumexp(dim=-1)

    @contextmanager
    def _last_positions_only(self) -> Iterator[dict[str, int]]:
        """Only answer positions through the LM head: by ``logits_to_keep``, or by trimming what the head is given."""
        hub: Any = self.model
        head = hub.get_output_embeddings() if hasattr(hub, "get_output_embeddings") else None
        if self._keeps_logits or head is None:
            yield {"logits_to_keep": self.steps} if self._keeps_logits else {}
            return

        def trim(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            return (args[0][:, -self.steps :], *args[1:]), kwargs

        with HookSet() as hooks:
            hooks.forward_pre(head, trim, name="last positions", fenced=False)
            yield {}


def _extend(name: str, value: torch.Tensor, length: int, answer_token_type: int) -> torch.Tensor:
    missing = length - value.shape[1]
    if missing <= 0:
        return value[:, :length]
    tail = value[:, -1:].expand(-1, missing, *value.shape[2:])
    if "type_ids" in name:
        tail = torch.full_like(tail, answer_token_type)
    return torch.cat([value, tail], dim=1)


def input_device(model: torch.nn.Module) -> torch.device:
    """The device that token ids and pixels go to: that of the input embeddings."""
    hub: Any = model
    embeddings = hub.get_input_embeddings() if hasattr(hub, "get_input_embeddings") else None
    weight = getattr(embeddings, "weight", None)
    device = weight.device if weight is not None else next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
