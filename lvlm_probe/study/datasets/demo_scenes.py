"""The demo scenes as a data set: drawn, not stored; the region that decides every answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from lvlm_probe.demo.questions import DOMAINS
from lvlm_probe.demo.scene import SPLITS, Scene, scene_rng, scenes
from lvlm_probe.errors import StudyError
from lvlm_probe.study.datasets.registry import Sample, register_dataset


@register_dataset("demo", layout="nothing: source is the split of the scenes (train, tune or eval)")
def demo_scenes(
    source: str,
    *,
    split: str | None = None,
    hard: bool = False,
    start: int = 0,
    seed: int = 0,
    human: Literal["region"] | None = None,
) -> Iterator[Sample]:
    """Demo scenes without end; give the data set a limit.

    Args:
        source: Split of the scenes, unless ``split`` names it.
        hard: The hard kind, e.g. ``hard: true``.
        start: Number of the first one, e.g. ``start: 100``.
        seed: Of the scenes, e.g. ``seed: 1``.
        human: Let the region that decides the answer stand where a data set of people's attention has their maps:
            nobody has looked at these images, e.g. ``human: region``.

    Raises:
        StudyError: there is no such split.
    """
    wanted = split or source
    if wanted not in SPLITS:
        raise StudyError(f"demo scenes: there is no split {wanted!r}; source is one of {', '.join(SPLITS)}")
    index = start
    while True:
        (scene,) = scenes(1, seed=seed, split=wanted, start=index, hard=hard)
        yield _sample(scene, index, human)
        index += 1


def _sample(scene: Scene, index: int, human: str | None) -> Sample:
    annotations: dict[str, object] = {"region": scene.mask, "contradiction": _contradiction(scene)}
    if human == "region":
        annotations["human"] = scene.mask.astype("float32")
    return Sample(
        id=str(index),
        question=scene.question,
        load=lambda: scene.image,
        answer=scene.answer,
        group=scene.kind,
        annotations=annotations,
    )


def _contradiction(scene: Scene) -> str:
    """The answer with one of the words that only the image can tell exchanged for another of its kind."""
    rng = scene_rng(scene.split, scene.seed, scene.index, hard=True)  # draws that the scene is not made of
    start, stop = scene.visual_spans[int(rng.integers(len(scene.visual_spans)))]
    word = scene.answer[start:stop]
    domain = next(words for words in DOMAINS.values() if word in words)
    others = [other for other in domain if other != word]
    return scene.answer[:start] + others[int(rng.integers(len(others)))] + scene.answer[stop:]
