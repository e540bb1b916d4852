"""Final hidden states of a decoder and rows of its LM head: what maps of a word's class over the image are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from lvlm_probe.errors import ExplainError, ReplayError
from lvlm_probe.models.anatomy import lm_head
from lvlm_probe.models.inputs import input_device
from lvlm_probe.models.replica import Replica

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

HIDDEN = "decoder.hidden"
"""Name of the point that holds hidden states, ``(position, channel)``."""
ROWS = "decoder.head_rows"
"""Name of the point that holds the LM head's rows of all text tokens, ``(text_token, channel)``."""


def hidden_states(replay: Replay) -> Tensor:
    """The decoder's output (behind its last norm) at every position of prompt and answer, but the answer's last token.

    Returns:
        ``(position, channel)`` on the CPU, in the model's own type. One forward pass.

    Raises:
        ExplainError: The model does not run its decoder over these positions.
    """
    path = replay.anatomy.decoder
    if not path:
        raise ExplainError(f"{type(replay.model).__name__} has no decoder of its own to look at")
    with replay.capture(modules=[path]) as seen, torch.no_grad():
        replay.run_inputs(dict(replay.path.inputs))
    found = seen.outputs.get(path)
    if not one_per_token(found, replay):
        raise ExplainError(
            f"{path} of {type(replay.model).__name__} does not give one hidden state per token of prompt and answer"
        )
    return found[0].cpu()


def one_per_token(states: Tensor | None, replay: Replay) -> TypeGuard[Tensor]:
    """Whether states are of prompt and answer, ``(1, position, channel)``: a decoder whose prompt goes into an encoder
    has those of the answer alone."""
    if replay.anatomy.encodes_prompt or states is None:
        return False
    return states.ndim == 3 and states.shape[1] == replay.length


def head_rows(model: nn.Module, ids: Tensor) -> Tensor:
    """Rows of the LM head for some token ids, ``(token, channel)`` on the CPU. Raises ``ExplainError`` without one."""
    head = lm_head(model)
    weight = getattr(head, "weight", None)
    if head is None or weight is None or weight.ndim != 2:
        raise ExplainError(f"{type(model).__name__} has no linear LM head whose rows could be read")
    if weight.is_meta or {"base_layer", "original_module"} & set(head._modules):
        # Offloaded, or adapted: the rows that it computes with are the gradients of its own outputs.
        with Replica(head).use() as own, torch.enable_grad():
            states = torch.zeros(len(ids), weight.shape[1], dtype=weight.dtype, device=input_device(model))
            states.requires_grad_(True)
            picked = own(states).gather(-1, ids.to(states.device)[:, None]).sum()
            return torch.autograd.grad(picked, states)[0].cpu()
    return weight.detach()[ids.to(weight.device)].cpu()


def text_tokens(prompt: np.ndarray, image_positions: np.ndarray, answer: np.ndarray) -> tuple[Tensor, Tensor]:
    """Positions in prompt + answer of all tokens that are not the image's, and their ids, ``(text_token,)`` each."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    text = torch.ones(len(ids), dtype=torch.bool)
    text[torch.tensor(np.asarray(image_positions), dtype=torch.long)] = False
    return text.nonzero()[:, 0], ids[text]


def narrowed(values: Tensor) -> Tensor:
    """Half precision, for a file; single precision where the range of half does not hold the values."""
    half = values.half()
    return half if bool(torch.isfinite(half).all()) else values.float()


def point_records(
    replay: Replay, prompt: np.ndarray, image_positions: np.ndarray, answer: np.ndarray
) -> dict[str, Any]:
    """Both points of one recorded answer, ready for a trace. Raises ``ReplayError`` where they cannot be had."""
    from lvlm_probe.trace.records import PointRecord

    _, ids = text_tokens(prompt, image_positions, answer)
    try:
        hidden, rows = narrowed(hidden_states(replay)), narrowed(head_rows(replay.model, ids))
    except ExplainError as error:
        raise ReplayError(str(error)) from error
    decoder = replay.anatomy.decoder
    return {
        HIDDEN: PointRecord(hidden, ("position", "channel"), (), "none", decoder),
        ROWS: PointRecord(rows, ("text_token", "channel"), (), "none", "lm_head"),
    }
