"""Relevance through attention layers, one layer at a time: what T-MM and IIA share.

Relevance of the score to the tokens is a product over layers, R = (I + Ā_L) … (I + Ā_1) (Chefer et al., 2021), and what
is wanted of it are the rows of a few query tokens. A row vector times that product can be taken from the left,
``v ← v + vᵀĀ_l`` for l = L … 1, and that is the order in which ``backward`` arrives at the layers: each Ā_l is made for
the rows where v is not 0, used, and dropped. Nothing of size layer × head × token × token ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lvlm_probe.boxes.encoder_tokens import EncoderTokens, tokens_that_read
from lvlm_probe.boxes.image_tokens import ImageTokens, image_tokens
from lvlm_probe.boxes.painting import paint, pitch
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.registry import Problem, Shape
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer

Scope = Literal["decoder", "encoder", "both"]

Bar = Callable[[AttentionLayer, Tensor], Tensor]
"""Ā of some query rows of a layer, averaged over heads: ``(view, row, key)``."""


def parts_of(scope: Scope) -> tuple[Literal["decoder", "encoder"], ...]:
    """The parts of the model whose attention a scope takes in."""
    return ("decoder", "encoder") if scope == "both" else (scope,)


def relu_products(layer: AttentionLayer, rows: Tensor) -> Tensor:
    """ReLU(dA ⊙ A) of every head, ``(view, head, row, key)``."""
    return (layer.weights(rows) * layer.weight_gradient(rows)).clamp_(min=0)


def relu_product(layer: AttentionLayer, rows: Tensor) -> Tensor:
    """Ā = mean over heads of ReLU(dA ⊙ A), ``(view, row, key)``, float64 on the CPU. Chefer et al. (2021), Eq. 5."""
    return relu_products(layer, rows).mean(dim=1, dtype=sum_dtype(layer.device))


def query_rows(problem: Problem) -> Iterator[tuple[int, Tensor]]:
    """``(sequence, positions that predict what is scored in it)``: the answer, then other courses of it that a score
    reads."""
    yield 0, problem.queries
    own = problem.selection.score
    if own is None:
        return
    first = len(problem.trace.input_ids) - 1
    for row, (step, ids) in enumerate(own.longer, start=1):
        yield row, first + step + torch.arange(1, len(ids))


def whole_sequence(layer: AttentionLayer, length: int) -> None:
    """Raises ``ExplainError`` where a layer does not attend over the tokens that are known, or a window of them."""
    if layer.keys != layer.queries or layer.start + layer.queries > length:
        raise ExplainError(
            f"{layer.layer.module} attends over {layer.keys} keys for {layer.queries} queries from position "
            f"{layer.start} on, where {length} tokens are known: relevance cannot be carried through it"
        )


def same_views(layer: AttentionLayer, ran: int, known: int) -> None:
    """Raises ``ExplainError`` where a layer ran on another number of sequences than is known."""
    if ran != known:
        raise ExplainError(
            f"{layer.layer.module} ran on {ran} sequences where {known} are known (windows as batch entries): "
            f"relevance cannot be carried through it"
        )


def one_sequence(problem: Problem, way_out: str) -> None:
    """Raises ``ExplainError`` where a score reads several sequences: an encoder is followed through one."""
    if problem.replay.rows > 1:
        raise ExplainError(
            f"{problem.selection.label!r} is scored on {problem.replay.rows} sequences per image, of which the encoder "
            f"is not followed one by one: {way_out}"
        )


def no_gradient(part: str) -> ExplainError:
    """What is raised where no relevance has arrived in the attention of a part of the model."""
    return ExplainError(f"the score has no gradient to the attention of the {part}: nothing can be said about it")


@dataclass
class Walk:
    """Carries the relevance vector down the layers; an instance is what ``Replay.capture`` takes as ``visit``.

    Attributes:
        problem: What is explained.
        scope: ``"decoder"``: from the answer's query positions down to the image tokens. ``"encoder"``: from all
            tokens of the encoder alike down to its patches. ``"both"``: the decoder's relevance of the image tokens is
            where the encoder starts.
        bar: Ā of a layer.
        normalised: ``v ← v (Ā + I) / rowsum`` (rollout) instead of ``v + vᵀĀ``.
        last_factor: ``"identity"``: the lowest layer is I + Ā_1 as all others; ``"bare"``: Ā_1 alone, the paper's
            wording.
        encoder: Number or name of the encoder, where a model has several (``tokens_that_read``).
        shares: What each position of ``query_rows`` counts, ``(position,)``; by default all the same.
    """

    problem: Problem
    scope: Scope
    bar: Bar
    normalised: bool = False
    last_factor: Literal["identity", "bare"] = "identity"
    encoder: int | str = 0
    shares: Tensor | None = None
    visited: list[str] = field(default_factory=list)
    _lowest: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scope not in ("decoder", "encoder", "both"):
            raise ExplainError(f"scope is 'decoder', 'encoder' or 'both'; got {self.scope!r}")
        if self.last_factor not in ("identity", "bare"):
            raise ExplainError(f"last_factor is 'identity' or 'bare'; got {self.last_factor!r}")
        replay = self.problem.replay
        self.image_tokens: ImageTokens | None = None
        self.encoder_tokens: EncoderTokens | None = None
        self._vectors: dict[str, Tensor] = {}
        if self.scope != "encoder":
            self.image_tokens = image_tokens(replay, self.problem.target)
        if self.scope != "decoder":
            one_sequence(self.problem, "give scope='decoder', or alternatives of a single token")
            self.encoder_tokens = tokens_that_read(replay, self.encoder, self.problem.target)

    @property
    def parts(self) -> tuple[Literal["decoder", "encoder"], ...]:
        """What ``Replay.capture`` is to read."""
        return parts_of(self.scope)

    @property
    def lowest_part(self) -> str:
        return "decoder" if self.encoder_tokens is None else self.encoder_tokens.encoder

    @property
    def layers(self) -> int:
        """Number of layers visited; one that attends in windows is visited once for each."""
        return len(set(self.visited))

    def starts_at(self, lowest: str) -> None:
        """Says which attention module is the lowest one, for ``last_factor``."""
        self._lowest = lowest

    def __call__(self, layer: AttentionLayer) -> None:
        if layer.part != "decoder" and layer.part != self.lowest_part:
            return  # another encoder
        if layer.part == "decoder" and self.scope == "encoder":
            return
        vector = self._vector(layer.part)
        stop = layer.start + layer.queries
        whole_sequence(layer, vector.shape[1])
        present = vector[:, layer.start : stop]
        carried = present.to(layer.device, sum_dtype(layer.device))
        total = torch.zeros_like(carried)
        bare = self.last_factor == "bare" and layer.layer.module == self._lowest
        live = (present != 0).any(dim=0)
        blocks = [rows[live[rows]] for rows in layer.blocks(live.device)]
        # All rows go to the device at once: the host waits for each copy.
        for rows in torch.cat(blocks).to(layer.device).split([len(rows) for rows in blocks if len(rows)]):
            share = carried[:, rows]
            bar = self.bar(layer, rows)
            same_views(layer, bar.shape[0], vector.shape[0])
            if self.normalised:
                share = share / (1 + bar.sum(dim=-1))
            if not bare:
                total[:, rows] += share
            total += torch.einsum("vr,vrk->vk", share, bar)
            del bar  # before the next one is made
        vector[:, layer.start : stop] = total.cpu()
        self.visited.append(layer.layer.module)

    def _vector(self, part: str) -> Tensor:
        """What has been carried down to a layer of this part, ``(sequence or view, token)``."""
        if part not in self._vectors:
            self._vectors[part] = self._decoder_start() if part == "decoder" else self._encoder_start()
        return self._vectors[part]

    def _decoder_start(self) -> Tensor:
        # y is a sum over the selected tokens, so one backward pass serves all of them; each other course of the answer
        # that a score reads is a sequence of its own.
        start = torch.zeros(self.problem.replay.rows, self.problem.replay.length, dtype=torch.float64)
        at = 0
        for row, queries in query_rows(self.problem):
            shares = torch.ones(len(queries)) if self.shares is None else self.shares[at : at + len(queries)]
            start[row].index_add_(0, queries, shares.double())
            at += len(queries)
        return start

    def _encoder_start(self) -> Tensor:
        tokens = self.encoder_tokens
        assert tokens is not None
        live = torch.from_numpy(tokens.live)
        shape = tokens.shape if len(tokens.shape) == 2 else (1, *tokens.shape)
        if self.image_tokens is None:
            return (live.double() / live.sum()).reshape(shape)
        above = self._vector("decoder")[0, self.image_tokens.positions]
        inside = _inside(self.image_tokens.boxes, tokens.boxes)
        share = inside / inside.sum(dim=1, keepdim=True).clamp(min=1e-12)
        return (above @ share).reshape(shape)

    def values(self) -> tuple[Tensor, np.ndarray, Shape]:
        """Relevance per token, boxes or tubes of the tokens, and the grid that suits them.

        Raises:
            ExplainError: No gradient reached any layer of the part that was asked for.
        """
        size = self.problem.extent
        vector = self._vectors.get(self.lowest_part)
        if vector is None or not self.visited:
            raise no_gradient(self.scope)
        if self.encoder_tokens is not None:
            live = self.encoder_tokens.live
            boxes = self.encoder_tokens.boxes[live]
            return vector.reshape(-1)[torch.from_numpy(live)], boxes, pitch(boxes, size)
        assert self.image_tokens is not None
        return (
            vector[:, self.image_tokens.positions].sum(dim=0),
            self.image_tokens.boxes,
            pitch(self.image_tokens.boxes, size),
        )

    def painted(self, size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Those values on a grid over the image or clip (``paint``); ``size=None`` is the tokens' own grid."""
        values, boxes, own = self.values()
        shape = own if size is None else self.problem.shape(size)
        return paint(values, boxes, self.problem.extent, shape)


def _inside(first: np.ndarray, second: np.ndarray) -> Tensor:
    """How much of every box or tube of the second list lies in each of the first, 0..1, ``(first, second)`` float64.

    The two lists come from different traces and differ by a hair at their edges: under 2 % is none, over 98 % is all.
    """
    one, two = torch.from_numpy(first).double(), torch.from_numpy(second).double()
    shared, area = torch.ones(len(one), len(two), dtype=torch.float64), torch.ones(len(two), dtype=torch.float64)
    axes = one.shape[1] // 2
    for low, high in zip(range(axes), range(axes, 2 * axes), strict=True):
        both = torch.minimum(one[:, None, high], two[:, high]) - torch.maximum(one[:, None, low], two[:, low])
        shared *= both.clamp(min=0)
        area *= two[:, high] - two[:, low]
    share = shared / area.clamp(min=1e-9)
    return torch.where(share < 0.02, 0.0, torch.where(share > 0.98, 1.0, share))
