"""Draws the README's picture: three answers of the embedded model, each with the region behind its words.

python examples/overview_picture.py --out docs/overview.jpg
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

import lvlm_probe as probe

SCENES = (("colour", 0), ("where", 4), ("count", 5))  # kind, index of the held-out scene


def explained(model: Any, processor: Any, kind: str, start: int, directory: str) -> tuple[Any, Any, Any]:
    """One held-out scene of a kind, recorded, explained and scored."""
    scene = probe.demo.scenes(1, split="eval", seed=7, kinds=[kind], start=start)[0]
    with probe.attach(model, processor) as p, p.record(directory, question=scene.question) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    replay = probe.replay(recording.traces[0], model, processor)
    heat = probe.explain(replay)
    return replay, heat, probe.evaluate(heat, replay)


def draw(items: list[tuple[Any, Any, Any]], out: Path) -> None:
    """Overlay, question, answer with its selected words in colour, scores."""
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure, axes = pyplot.subplots(1, len(items), figsize=(4.2 * len(items), 5.2), facecolor="white")
    for axis, (replay, heat, score) in zip(axes, items, strict=True):
        axis.imshow(heat.overlay())
        axis.set_axis_off()
        axis.set_title(replay.trace.question, fontsize=13, color="#555555", pad=10)
        words: list[Any] = []
        for word in replay.words:
            chosen = any(word.start <= step < word.stop for step in heat.selection.indices)
            look = {"color": "#c2410c", "fontweight": "bold"} if chosen else {"color": "#222222"}
            area = TextArea(word.text, textprops={"fontsize": 16, **look})
            # Punctuation stands close to the word before it.
            words.append(HPacker(children=[words.pop(), area], pad=0, sep=0) if word.text in ".,!?" else area)
        line = HPacker(children=words, pad=0, sep=5)
        axis.add_artist(
            AnchoredOffsetbox(
                "upper center",
                child=line,
                frameon=False,
                bbox_to_anchor=(0.5, -0.01),
                pad=0.3,
                bbox_transform=axis.transAxes,
            )
        )
        axis.text(
            0.5, -0.17, f"deletion {score.deletion:.2f}   insertion {score.insertion:.2f}", fontsize=11,
            color="#777777", ha="center", transform=axis.transAxes,
        )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.17, wspace=0.04)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Explain and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/overview.jpg"))
    options = parser.parse_args()
    model, processor = probe.demo.load()
    with tempfile.TemporaryDirectory() as directory:
        draw([explained(model, processor, kind, index, directory) for kind, index in SCENES], options.out)
    print(options.out)


if __name__ == "__main__":
    main()
