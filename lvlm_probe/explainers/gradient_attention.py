"""Attention times its gradient where the words are predicted, heads and words weighted by their share on the image
(after Bousselham et al., 2026, DEX-AR).

For the position q_t that predicts word token t, layer l and head h, with y the log-likelihood of the selected tokens::

    E_lh = ReLU(A_lh[q_t] ⊙ ∂y/∂A_lh[q_t])        over all keys
    w_lh = Σ_image E_lh / Σ_all E_lh              a head that reads text counts little
    m_t  = Σ_lh w_lh E_lh                         over the image tokens
    g_t  = Σ_lh Σ_image E_lh / Σ_lh Σ_all E_lh    a token that comes from text counts little
    map  = Σ_t g_t m_t

Nothing is carried from layer to layer, as T-MM does: what question tokens have read and hand on is not in it. One
backward pass serves all tokens, since y is a sum; so the gradient at q_t holds what later selected tokens read there
too. Only rows q_t are made: memory is that of the attention method. The paper's own normalisations could not be had.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lvlm_probe.boxes.image_tokens import ImageTokens, image_tokens
from lvlm_probe.explainers.attention_relevance import no_gradient, query_rows, relu_products, same_views, whole_sequence
from lvlm_probe.explainers.registry import Cost, Outcome, Problem, register
from lvlm_probe.explainers.scores import of_tokens
from lvlm_probe.models.precision import sum_dtype
from lvlm_probe.replaying.capture import AttentionLayer


@dataclass
class Reading:
    """What the positions that predict the words read in one pass; an instance is ``visit`` of ``Replay.capture``.

    Attributes:
        problem: what is explained.
        tokens: the image's tokens.
        maps: m_t, ``(position, image_token)`` float64, positions as in ``query_rows``.
        image, everything: Σ E over image tokens and over all keys, of all layers and heads, ``(position,)`` float64.
        layers: number of layers read.
    """

    problem: Problem
    tokens: ImageTokens
    filtered: bool = True
    layers: int = 0
    maps: Tensor = field(init=False)
    image: Tensor = field(init=False)
    everything: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._rows = list(query_rows(self.problem))
        count = sum(len(queries) for _, queries in self._rows)
        self.maps = torch.zeros(count, len(self.tokens), dtype=torch.float64)
        self.image, self.everything = torch.zeros(2, count, dtype=torch.float64)

    @property
    def shares(self) -> Tensor:
        """g_t, ``(position,)`` float64: 0 where nothing was read."""
        return self.image / self.everything.clamp(min=torch.finfo(torch.float64).tiny)

    def __call__(self, layer: AttentionLayer) -> None:
        whole_sequence(layer, self.problem.replay.length)
        same_views(layer, layer.batch, self.problem.replay.rows)
        columns = torch.from_numpy(self.tokens.positions).to(layer.device)
        wide, at = sum_dtype(layer.device), 0
        for sequence, queries in self._rows:
            rows = queries.to(layer.device)
            product = relu_products(layer, rows)[sequence].to(wide)
            seen, whole = product[..., columns], product.sum(dim=-1)  # (head, position, image_token), (head, position)
            mine = slice(at, at + len(queries))
            share = seen.sum(dim=-1) / whole.clamp(min=torch.finfo(wide).tiny)
            weights = share if self.filtered else torch.ones_like(share)
            self.maps[mine] += (weights[..., None] * seen).sum(dim=0).cpu().double()
            self.image[mine] += seen.sum(dim=(0, 2)).cpu().double()
            self.everything[mine] += whole.sum(dim=0).cpu().double()
            at += len(queries)
        self.layers += 1


def reading_of(problem: Problem, *, filtered: bool = True) -> Reading:
    """Run one pass forward and backward on the whole image, and return what was read. Raises ``ExplainError``."""
    reading = Reading(problem, image_tokens(problem.replay, problem.target), filtered)
    with problem.replay.capture(attention=["decoder"], visit=reading):
        problem.replay.score_and_grad(problem.whole, problem.score, image=problem.target)
    if not reading.layers:
        raise no_gradient("decoder")
    return reading


@register(
    "gradient_attention",
    needs=("passes", "gradients", "attention"),
    cost=lambda *_: Cost("relevance", 1, 1),
    clips=True,
)
def gradient_attention(
    problem: Problem, *, filtered: bool = True, size: int | tuple[int, int] | None = None
) -> Outcome:
    """Explains by attention times its gradient at the words' own positions. One forward and one backward pass.

    Args:
        filtered: Weight heads and words by their share on the image; otherwise all count the same.
        size: Grid of the heatmap, by default the tokens' own.

    Raises:
        ExplainError: The model's attention cannot be read, or the places of its tokens are not known.
    """
    reading = reading_of(problem, filtered=filtered)
    problem.advance(1, 1)
    shares = reading.shares if filtered else torch.ones_like(reading.shares)
    values, boxes = shares @ reading.maps, reading.tokens.boxes
    diagnostics = {"layers": reading.layers, "share_on_image": reading.shares.tolist()}
    return of_tokens(problem, values, boxes, size, {"filtered": filtered}, diagnostics=diagnostics)
