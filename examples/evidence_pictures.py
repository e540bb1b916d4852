"""Draws the pictures of docs/evidence.md, one per question:  python examples/evidence_pictures.py [NAME …] [--out DIR]

Those of contrasts and of edits have scripts of their own, ``why_not_blue.py`` and ``without_this.py``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from PIL import Image, ImageDraw

import lvlm_probe as probe
from lvlm_probe.evidence import AnswerBox

HERE = Path(__file__).parent
DOCUMENT_MODEL = HERE / "document_model"
HOT, COLD, PLAIN = "#c2410c", "#0369a1", "#78716c"


def asked(kind: str, start: int = 0) -> tuple[Any, Any]:
    """A held-out scene and the embedded model's answer."""
    scene = probe.demo.scenes(1, kinds=[kind], start=start)[0]
    return scene, probe.ask(*probe.demo.load(), scene.image, scene.question)


def sheet(panels: Sequence[tuple[Any, str]], high: float = 3.2) -> Any:
    """Images side by side, each with lines below it."""
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.3 * len(panels), high), squeeze=False)
    for axis, (image, text) in zip(axes[0], panels, strict=True):
        axis.imshow(image)
        axis.set_axis_off()
        axis.text(0, -0.04, text, transform=axis.transAxes, va="top", fontsize=9, linespacing=1.4)
    return figure


def outlined(image: Image.Image, rings: Sequence[Any], colour: str) -> Image.Image:
    """An image with outlines on it."""
    drawn = image.convert("RGB").copy()
    for ring in rings:
        ImageDraw.Draw(drawn).line([*ring, ring[0]], fill=colour, width=3)
    return drawn


def bars(axis: Any, names: Sequence[str], values: Sequence[float], said: str) -> None:
    """Bars to the right for what speaks for it, to the left for what speaks against it."""
    axis.barh(range(len(values)), values, color=[HOT if value >= 0 else COLD for value in values], height=0.6)
    axis.set_yticks(range(len(values)), names)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(said)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)


def which_region() -> Any:
    """A map with its verdict, and the smallest region of it that keeps 90 % of the score."""
    scene, answer = asked("pair")
    word = scene.visual_words[0]
    heat = probe.explain(answer.replay, tokens=word)
    score = probe.evaluate(heat, answer.replay, steps=40)
    region = probe.evidence.region(score, heat)
    alone = f"Shown alone, {100 * region.area:.1f} % of the image keeps {100 * region.kept:.0f} % of the score."
    return sheet(
        [
            (heat.overlay(score=score), wrapped(f"{scene.question} {answer.text}") + f"\nWhy “{word}”?"),
            (outlined(scene.image, region.polygons, "white"), wrapped(alone)),
        ]
    )


def says_here() -> Any:
    """The map of a word with a box around its object, and with one around another."""
    scene, answer = asked("pair")
    word = scene.visual_words[0]
    heat = probe.explain(answer.replay, tokens=word)
    panels = []
    own = next(item for item in scene.layout.items if item.colour == word)
    for item in (own, next(item for item in scene.layout.items if item.colour not in scene.answer)):
        side = scene.image.width
        reach = 1.15 * item.radius
        place = (item.x - reach, item.y - reach, item.x + reach, item.y + reach)
        pixels = tuple(edge * side for edge in place)
        box = AnswerBox("box", pixels, f"the {item.shape}", place, "1", 0, scene.image.size, ())
        said = probe.evidence.check_box(box, heat).sentence
        first, _, rest = said.partition(": ")
        panels.append((probe.evidence.draw_boxes(heat.overlay(mark=False), [box]), f"{first}:\n{wrapped(rest, 40)}"))
    return sheet(panels)


def where_on_the_page() -> Any:
    """A receipt, the map of a value in its answer, and the boxes of both values."""
    scene = next(one for one in probe.demo.documents(16, kinds=["record"]) if one.page.layout == "receipt")
    answer = probe.ask(*probe.load(DOCUMENT_MODEL), scene.image, scene.question)
    places = probe.evidence.locate(answer.replay, progress=False)
    drawn = scene.image
    for place, colour in zip(places, (COLD, HOT), strict=True):
        if place.region is not None:
            drawn = outlined(drawn, place.region.polygons, colour)
    told = ", ".join(f"{place.field.value} {name}" for place, name in zip(places, ("blue", "red"), strict=True))
    return sheet(
        [
            (scene.image, wrapped(f"{scene.question} {answer.text}")),
            (places[-1].heat.overlay(score=places[-1].score), f"Why “{places[-1].field.value}”?"),
            (drawn, wrapped(f"What keeps 90 % of the score: {told}")),
        ]
    )


def which_part() -> Any:
    """Two images and a question, with the share of each."""
    scenes = probe.demo.scenes(2, kinds=["colour"])[::-1]
    answer = probe.ask(*probe.demo.load(), [scene.image for scene in scenes], scenes[0].question)
    shares = probe.causal.which_parts(answer.replay, "all", tokens=scenes[0].visual_words[0], progress=False)
    figure, axes = pyplot.subplots(1, 3, figsize=(9.0, 2.5), width_ratios=[1, 1, 0.9])
    for number, (axis, scene) in enumerate(zip(axes, scenes, strict=False), 1):
        axis.imshow(scene.image)
        axis.set_axis_off()
        axis.set_title(f"image {number}", fontsize=10)
    figure.subplots_adjust(wspace=0.5)
    bars(axes[2], ["image 1", "image 2", "question"], shares.shares, f"what each adds to “{shares.text}”, nats")
    figure.text(0.13, 0.04, f"{scenes[0].question} {answer.text}", fontsize=10)
    return figure


def image_or_question() -> Any:
    """Of each word of an answer what the image gives, what the question, and what both together."""
    scene, answer = asked("where")
    parts = probe.causal.modalities(answer.replay, tokens=[word.text for word in answer.replay.words[:-1]])
    figure, axis = pyplot.subplots(figsize=(8.4, 2.6))
    places = range(len(parts.words))
    for shift, (name, colour) in enumerate((("image", HOT), ("question", COLD), ("together", PLAIN))):
        axis.bar([place + 0.27 * (shift - 1) for place in places], getattr(parts, name), 0.25, color=colour, label=name)
    axis.set_xticks(list(places), parts.words)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("nats")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9)
    axis.set_title(scene.question, fontsize=10, loc="left")
    return figure


def which_step() -> Any:
    """An answer of four steps: what the image gives to each, and what the last loses without each of the others."""
    scene = probe.demo.scenes(1, kinds=["pair"])[0]
    names = scene.question.removeprefix("What color are the ").removesuffix("?").split(" and the ")
    steps = [f"The {name} is {colour}." for name, colour in zip(names, scene.visual_words, strict=True)]
    row = {"question": scene.question, "answer": " ".join([f"I count one {names[0]}.", *steps, scene.answer])}
    model, processor = probe.demo.load()
    with tempfile.TemporaryDirectory() as folder:
        scene.image.save(f"{folder}/scene.png")
        Path(f"{folder}/answers.jsonl").write_text(json.dumps({"image": f"{folder}/scene.png", **row}) + "\n")
        (made,) = probe.import_answers(f"{folder}/answers.jsonl", model, processor, f"{folder}/runs").imported
        trace = probe.open_trace(made.path)
        found = probe.causal.check_steps(probe.replay(trace, model, processor), progress=False)
    figure, axes = pyplot.subplots(1, 2, figsize=(7.4, 1.9), sharey=True, width_ratios=[1, 1])
    told = [step.text for step in found]
    bars(axes[0], told, [step.from_image or 0.0 for step in found], "comes from the image, nats")
    bars(axes[1], told, [step.unread or 0.0 for step in found], "the last step loses without it, nats")
    return figure


def wrapped(text: str, most: int = 36) -> str:
    """A sentence in short lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


PICTURES: dict[str, Callable[[], Any]] = {
    "region": which_region,
    "box": says_here,
    "page": where_on_the_page,
    "part": which_part,
    "modalities": image_or_question,
    "steps": which_step,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], help="which; by default all")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args(arguments)
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9})
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        figure = PICTURES[name]()
        scenes = any(axis.images for axis in figure.axes)
        path = options.out / f"evidence-{name}.{'jpg' if scenes else 'png'}"
        more = {"pil_kwargs": {"quality": 85}} if scenes else {}
        figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.08, **more)
        pyplot.close(figure)
        print(path, f"{path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
