"""Replays that remember what masks gave: found again to the last bit, and never for another question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lvlm_probe as probe
from lvlm_probe.serving.journal import Journal


@pytest.fixture(scope="module")
def replay() -> probe.Replay:
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1)
    return probe.ask(model, processor, scene.image, scene.question).replay


def test_a_call_is_found_again_to_the_last_bit_and_counted(replay: probe.Replay, tmp_path: Path) -> None:
    masks = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0))
    first = replay.journalled(Journal(tmp_path / "masks.jsonl"))
    given = first.log_probs(masks, image=0, steps=[3])
    # From the file, as after a stop; the model is not asked.
    again = replay.journalled(Journal(tmp_path / "masks.jsonl"))
    before = again.passes.forward
    forbidden(
        again,
        lambda: torch.testing.assert_close(
            again.log_probs(masks, image=0, steps=[3]), given, rtol=0, atol=0, equal_nan=True
        ),
    )
    assert again.passes.forward == before + 5


def forbidden(replay: Any, call: Any) -> None:
    """Run a call in which the model must not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(replay), "_in_micro_batches", lambda *_: pytest.fail("the model was asked"))
        call()


def test_what_decides_the_numbers_decides_what_is_found(replay: probe.Replay) -> None:
    masks = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(1))
    journal = Journal(None)
    kept = replay.journalled(journal)
    kept.log_probs(masks, image=0, steps=[3])
    assert len(journal) == 2
    blank = kept.over("blank")
    ways: list[Any] = [
        lambda: blank.log_probs(masks, image=0, steps=[3]),
        lambda: kept.log_probs(masks, image=0, steps=[2]),
        lambda: kept.log_probs(masks, image=0, steps=[3], mode="exact"),
        lambda: kept.log_probs(1 - masks, image=0, steps=[3]),
    ]
    for number, way in enumerate(ways, start=2):
        way()
        assert len(journal) == 2 * number
    torch.testing.assert_close(
        blank.log_probs(masks, image=0, steps=[3]), replay.over("blank").log_probs(masks, image=0, steps=[3]),
        equal_nan=True,
    )  # fmt: skip


def test_gradients_and_noise_are_never_taken_from_it(replay: probe.Replay) -> None:
    replay.require_gradients()  # which is looked into once, by passes of its own
    journal = Journal(None)
    kept = replay.journalled(journal)
    mask = torch.full((1, 6, 7), 0.5, requires_grad=True)
    kept.log_probs(mask, image=0)[0, 3].backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0
    kept.log_probs(mask.detach(), image=0, noise=0.1, generator=torch.Generator().manual_seed(0))
    kept.score_and_grad(mask.detach(), lambda log_probs: log_probs[:, 3], image=0)
    assert len(journal) == 0


def test_a_call_that_is_known_in_part_is_made_as_a_whole(replay: probe.Replay) -> None:
    masks = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(2))
    kept = replay.journalled(Journal(None))
    kept.log_probs(masks[:1], image=0)
    before = kept.passes.forward
    found = kept.log_probs(masks, image=0)
    assert kept.passes.forward == before + 3
    assert torch.equal(found, replay.log_probs(masks, image=0))
