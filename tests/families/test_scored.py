"""Several courses of an answer in one pass, in every family: as each of them is scored alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from zoo import build, load_members

import lvlm_probe as probe
from lvlm_probe.replaying.own_scores import Contrast

UNLIKE = ("florence2", "pix2struct", "kosmos-2.5", "hunyuan_vl")
"""A decoder beside an encoder; no prompt; text in front of the image in other inputs; positions counted over rows."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.campaign) for name in sorted(load_members())],
)
def test_alternatives_of_any_length_are_scored_as_they_are_alone(name: str, tmp_path: Path) -> None:
    built = build(name)
    with probe.attach(built.model, built.processor) as attached, attached.record(tmp_path) as recording:
        built.generate(built.inputs([built.picture(seed=1)]))
    replay = probe.replay(recording.traces[0], built.model, built.processor)
    said = replay.token_ids.tolist()
    drawn = [token for token in range(60, 600) if token not in {*said, *replay.anatomy.placeholders}][20:40]
    others = [tuple(drawn[:1]), tuple(drawn[1:4]), tuple(drawn[4:10])]  # the last goes on behind the answer's end
    scored = replay.scored(Contrast.of([(1, 3)], others, ["a", "b", "c"], "said"))
    masks = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))

    def alone(answer: list[int]) -> Any:
        return inside.answering(replay, answer).log_probs(masks)

    with torch.no_grad():
        own = alone(said)
        each = torch.stack([alone([said[0], *ids])[:, 1:].sum(dim=1) for ids in others])
        wanted = own[:, 1:3].sum(dim=1) - each.logsumexp(dim=0)
        whole, some = scored.log_probs(masks), scored.log_probs(masks, steps=[1])
    torch.testing.assert_close(whole[:, -1], wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(some[:, -1], wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(whole[:, :-1], own, atol=1e-3, rtol=0)
