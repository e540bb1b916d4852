"""The logit lens at image tokens: the words that the LM head reads off each of them, layer by layer.

The state behind decoder layer l at an image token goes through the decoder's last norm and the LM head, as if the
layers after l were not there (nostalgebraist, "interpreting GPT: the logit lens", 2020; at image tokens: Neo et al.,
"Towards interpreting visual information processing in vision-language models", ICLR 2025). Nothing is trained and one
pass is run. The last norm is the child of the decoder whose output is the decoder's own, so no family has to be known.

A word at an image token says what the state there is close to in the head's space, not that the answer uses it: that
is what ``knockout`` and ``patch`` measure. States of early layers lie in other directions than the head's, and read as
noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.causal.tokens import placed_tokens
from lvlm_probe.errors import ExplainError
from lvlm_probe.kinds import is_whole, naming_arguments
from lvlm_probe.models.anatomy import lm_head
from lvlm_probe.models.exhaustion import told_out_of_memory
from lvlm_probe.models.tokenizers import tokenizer_of, top_pieces
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.hidden_states import one_per_token
from lvlm_probe.replaying.isolation import outside_modes

if TYPE_CHECKING:
    from lvlm_probe.replaying import ReplayLike

_TOLERANCE = 0.05
"""Nats by which the lens behind the last layer may differ from the model's own log P of the answer: what half precision
rounds. Where the answer is not certain, scaled or capped logits differ by far more."""


@dataclass(frozen=True, repr=False)
class LogitLens:
    """The likeliest tokens at each image token, layer by layer.

    Attributes:
        words: ``(layer, image_token, rank)`` texts of tokens, the likeliest first.
        token_ids: ``(layer, image_token, rank)`` int64, their ids.
        probabilities: ``(layer, image_token, rank)`` float32. Where the model changes its logits behind the head, they
            are the head's and not the model's; ``notes`` says so.
        boxes: ``(image_token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the image.
        size: ``(width, height)`` of the image, pixels.
        image: number of the image.
        notes: sentences worth knowing.
    """

    __repr__, __eq__ = in_one_line, equal

    words: np.ndarray
    token_ids: np.ndarray
    probabilities: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]
    image: int = 0
    notes: tuple[str, ...] = ()

    def at(self, x: float, y: float) -> int:
        """Return the number of the image token whose box is closest to a point, in pixels of the image."""
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        off = np.maximum(np.maximum(low - (x, y), (x, y) - high), 0)
        # Of several that hold the point, overview and tile, the smaller one.
        return int(np.lexsort(((high - low).prod(axis=1), np.square(off).sum(axis=1)))[0])


@naming_arguments
@outside_modes
@told_out_of_memory
def logit_lens(replay: ReplayLike, *, image: int = 0, top: int = 5) -> LogitLens:
    """Read words off the states of image tokens, behind every layer of the decoder; one forward pass.

    ::

        lens = probe.causal.logit_lens(replay)
        lens.words[-2, lens.at(120, 80)]      # what the last layer but one holds at this pixel

    Args:
        image: number of the image.
        top: how many tokens for each.

    Raises:
        ExplainError: ``top`` is no whole number from 1 to as many tokens as there are, the model is not at hand (a
            server), its prompt holds no image tokens, or its decoder does not consist of layers, a last norm and a
            linear head.
    """
    if not is_whole(top) or int(top) < 1:
        raise ExplainError(f"top is a whole number of at least 1; got {top!r}")
    if not isinstance(replay, Replay):
        raise ExplainError(
            "the logit lens looks inside the model, and this replay is one without it: replay the trace on the model, "
            "probe.replay(trace, model, processor)"
        )
    tokens = placed_tokens(replay, image)
    decoder, layers, others = _decoder(replay)
    answer = replay.prompt_length - 1 + np.arange(len(replay.token_ids))
    with replay.replica.use() as model, torch.no_grad():
        with replay.capture(modules=[*layers, *others, decoder]) as seen:
            own = replay.run_inputs(dict(replay.path.inputs))[0]
        given = map(seen.outputs.get, layers)
        states = [state for state in given if one_per_token(state, replay)]
        if len(states) < len(layers):
            raise ExplainError(
                f"the layers of {decoder} do not give one state per token of prompt and answer, which the lens reads"
            )
        norm = _last_norm(model, decoder, seen.outputs, layers[-1], others)
        head, end = _head(model), seen.outputs[decoder].device

        def read(state: Tensor, positions: np.ndarray) -> Tensor:
            rows = state[0, torch.as_tensor(positions, device=state.device)].to(end)  # layers may be on several devices
            return head(norm(rows)).float().log_softmax(dim=-1)

        spoken = read(states[-1], answer)
        if int(top) > (words := spoken.shape[-1]):
            raise ExplainError(f"the model has {words:,} tokens; got top={top}")
        best = [read(state, tokens.positions).topk(int(top), dim=-1) for state in states]
        said = spoken.gather(1, replay.token_ids.to(spoken.device)[:, None])[:, 0]
    off = float((said.cpu() - own.cpu().float()).abs().max())
    ids = torch.stack([found.indices for found in best]).cpu().numpy()
    pieces = top_pieces(tokenizer_of(replay.processor), ids.ravel().tolist())
    return LogitLens(
        words=np.array(pieces, dtype=object).reshape(ids.shape),
        token_ids=ids,
        probabilities=torch.stack([found.values for found in best]).exp().cpu().numpy(),
        boxes=tokens.boxes,
        size=replay.image_sizes[image],
        image=image,
        notes=() if off <= _TOLERANCE else (_not_its_own(replay, off),),
    )


def _not_its_own(replay: Replay, off: float) -> str:
    return (
        f"{type(replay.model).__name__} changes its logits behind the head (log P of the answer differs by {off:.2g} "
        "nats): the order of the words is its own, their probabilities are not"
    )


def _decoder(replay: Replay) -> tuple[str, list[str], list[str]]:
    """Paths of the decoder, of its layers, and of its other children."""
    path = replay.anatomy.decoder
    name = type(replay.model).__name__
    if not path:
        raise ExplainError(f"{name} has no decoder of its own to look at")
    children = dict(replay.model.get_submodule(path).named_children())
    lists = {key: child for key, child in children.items() if isinstance(child, nn.ModuleList) and len(child)}
    if not lists:
        raise ExplainError(f"{path} of {name} holds no list of layers, which the lens reads one after the other")
    stack = max(lists, key=lambda key: len(lists[key]))
    others = [f"{path}.{key}" for key in children if key not in lists]
    return path, [f"{path}.{stack}.{number}" for number in range(len(lists[stack]))], others


def _last_norm(model: nn.Module, decoder: str, outputs: dict[str, Tensor], last: str, others: list[str]) -> Any:
    """The child of the decoder that makes its output of the last layer's."""
    final = outputs[decoder]
    for path, module in ((last, nn.Identity()), *((path, model.get_submodule(path)) for path in others)):
        found = outputs.get(path)
        if found is not None and found.shape == final.shape and torch.equal(found.to(final.device), final):
            return module
    raise ExplainError(
        f"no child of {decoder} gives what it gives itself: its last norm, which the lens needs, is not found"
    )


def _head(model: Any) -> Any:
    head = lm_head(model)
    if head is None:
        raise ExplainError(f"{type(model).__name__} has no LM head that is a module of its own")
    return head
