"""Teacher forcing: one pass over prompt and recorded answer that gives log P(a_t) at every step (paper, Eq. 1 and 5).

The answer's token t is predicted by the logits at position ``P + t - 1`` of the sequence ``prompt + answer[:-1]``
(P prompt tokens, t from 0), so one forward pass serves all steps and only those T positions go through the LM head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args, get_origin

import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.hooks import HookSet
from lvlm_probe.wrappers import execution_device, uncompiled

__all__ = ["OWN_PASS", "TeacherForcing", "apart", "checkpointed", "frozen", "input_device", "list_inputs"]

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
    """Gradient checkpointing in eval mode, on exactly the layers that support it.

    transformers checkpoints a layer only in training mode, which would switch on its dropout. Here each layer's
    ``forward`` is run by ``torch.utils.checkpoint`` as it is, so that the gradient stays the same to the last bit.

    Yields:
        the number of layers that will be recomputed.

    Raises:
        ReplayError: no layer supports it.
    """
    if not enabled:
        yield 0
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ReplayError(
            f"gradient checkpointing is not supported by any layer of {type(model).__name__}; replay without "
            f"gradient_checkpointing"
        )
    saved = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer in layers:
            # Through __dict__, where accelerate may have put a forward of its own, which then is what runs again.
            vars(layer)["forward"] = _recomputing(layer, layer.forward)
        yield len(layers)
    finally:
        for layer, own in saved:
            if own is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = own


_CACHES = ("past_key_values", "past_key_value", "layer_past")


def _recomputing(layer: torch.nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``original``, run once more in backward instead of keeping what it computed on the way."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    # Stopped half-way, accelerate would never put away again the weights it has brought for the recomputation.
    whole = any(weight.is_meta for weight in layer.parameters())

    # Frozen in the recomputation too: it runs in backward(), when the model's own flags are back in place.
    def again(*args: Any, **kwargs: Any) -> Any:
        with frozen(layer), uncompiled(layer):
            return original(*args, **kwargs)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not getattr(layer, "_can_checkpoint_with_cache", False):  # else its keys would enter a cache twice
            kwargs.update({name: None for name in _CACHES if kwargs.get(name) is not None})
        with set_checkpoint_early_stop(not whole):
            return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return forward


@contextmanager
def _own_pass() -> Iterator[None]:
    before = OWN_PASS.set(True)
    try:
        yield
    finally:
        OWN_PASS.reset(before)


@contextmanager
def _even_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Batch norms are handed contiguous gradients.

    torch 2.13 differentiates them wrongly on the CPU where one picture's gradient arrives permuted, as it does in a
    tower whose feature map is flattened into tokens (tests/test_forcing_layouts.py).
    """
    with HookSet() as hooks:
        for module in model.modules() if torch.is_grad_enabled() else ():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                hooks.forward(module, lambda _m, _a, _k, output: _Even.apply(output), name="batch norm", fenced=False)
        yield


class _Even(torch.autograd.Function):
    """The same tensor; its gradient contiguous."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.contiguous()


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
        image_token_id: the placeholder that image features replace. generate() reads one that the model has said as a
            word; in one pass over prompt and answer the model would look for a picture to it.
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
        apart_inputs: Mapping[str, torch.Tensor] | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        image_token_id: int | None = None,
    ) -> None:
        if token_ids.numel() == 0:
            raise ReplayError("the answer has no tokens, so there is nothing to replay")
        self.model = model
        self.device = input_device(model)
        self.steps = int(token_ids.numel())
        self._targets = token_ids.to(self.device).long()
        self._said_image = decoder_input_ids is None and image_token_id in token_ids[:-1].tolist()
        # What the answer continues: the prompt or, in an encoder-decoder model, the decoder's own beginning.
        start = input_ids if decoder_input_ids is None else decoder_input_ids.flatten()
        ids = torch.cat([start.long().cpu(), token_ids.long().cpu()[:-1]])
        self.length = int(ids.numel())
        asked = ids if decoder_input_ids is None else input_ids.long().cpu()
        width = int(asked.numel())
        self._sequence: dict[str, torch.Tensor] = {
            "input_ids": asked[None].to(self.device),
            "attention_mask": torch.ones(1, width, dtype=torch.long, device=self.device),
        }
        if decoder_input_ids is not None:
            self._sequence["decoder_input_ids"] = ids[None].to(self.device)
        for name, value in (sequence_inputs or {}).items():
            if name not in self._sequence:
                self._sequence[name] = _extend(name, value, width, answer_token_type).to(self.device)
        for name, value in (apart_inputs or {}).items():
            self._sequence.setdefault(name, value.to(self.device))
        self._other = dict(other_inputs or {})
        self._lists = list_inputs(model)
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
        inputs.update({name: inputs[name].tolist() for name in self._lists & inputs.keys()})
        if self._takes_use_cache:
            inputs["use_cache"] = False
        with (
            _own_pass(),
            uncompiled(self.model),
            frozen(self.model),
            checkpointed(self.model, enabled=checkpoint),
            _even_gradients(self.model),
            self._last_positions_only() as extra,
        ):
            try:
                logits = self.model(**inputs, **extra, return_dict=True).logits
            except (ValueError, RuntimeError, IndexError) as error:
                if not self._said_image or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ReplayError(
                    f"the answer holds the image token itself, to which {type(self.model).__name__} looks for another "
                    f"picture, so this answer cannot be replayed ({error})"
                ) from error
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


def list_inputs(model: torch.nn.Module) -> frozenset[str]:
    """Inputs that the model takes as lists, and as nothing else (``num_local_patches: list[int] | None``): traces and
    replays keep them as tensors."""

    def only_lists(annotation: Any) -> bool:
        kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
        if get_origin(annotation) is list:
            kinds = [annotation]
        return bool(kinds) and all(get_origin(kind) is list for kind in kinds)

    try:
        parameters = inspect.signature(model.forward, eval_str=True).parameters
    except Exception:  # annotations name what is not there to be looked up
        parameters = inspect.signature(model.forward).parameters
    return frozenset(name for name, parameter in parameters.items() if only_lists(parameter.annotation))


def apart(name: str, inputs: Mapping[str, Any]) -> bool:
    """Whether an input goes with another sequence of tokens than the prompt: one of a text that is read elsewhere
    (``qformer_attention_mask`` beside ``qformer_input_ids``), or of the decoder.
    """
    streams = [other.removesuffix("input_ids") for other in inputs if other.endswith("_input_ids")]
    return name.startswith(tuple(streams)) if streams else False


def _extend(name: str, value: torch.Tensor, length: int, answer_token_type: int) -> torch.Tensor:
    missing = length - value.shape[1]
    if missing <= 0:
        return value[:, :length]
    tail = value[:, -1:].expand(-1, missing, *value.shape[2:])
    if "type_ids" in name:
        tail = torch.full_like(tail, answer_token_type)
    elif name.endswith("position_mask"):  # which positions are the picture's: none of the answer's
        tail = torch.zeros_like(tail)
    return torch.cat([value, tail], dim=1)


def input_device(model: torch.nn.Module) -> torch.device:
    """The device that token ids and pixels go to: that of the input embeddings, or, offloaded, that they run on."""
    hub: Any = model
    try:
        embeddings = hub.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # remote code need not answer
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    device = weight.device if weight is not None else next(model.parameters()).device
    return execution_device(embeddings) if device.type == "meta" else device


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
