"""Draws the README's picture: three answers of the embedded model, each with the region behind its words.

python examples/overview_picture.py --out docs/overview.jpg
python examples/overview_picture.py --clips --out docs/video.jpg    # of videos, frame by frame; takes torchvision
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
from lvlm_probe.video import ClipHeatmap

SCENES = (("colour", 0), ("where", 4), ("count", 5))  # kind, index of the held-out scene
CLIPS = (("order", 1), ("direction", 1), ("appearance", 2))
VIDEO_MODEL = Path(__file__).parent / "video_model"


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


def draw_clips(model: Any, processor: Any, out: Path) -> None:
    """For each clip a strip of its frames under the heatmap, and below it the heatmap's share in each frame."""
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure = pyplot.figure(figsize=(12, 2.55 * len(CLIPS)), facecolor="white")
    for part, (kind, start) in zip(figure.subfigures(len(CLIPS), 1), CLIPS, strict=True):
        clip = probe.demo.clips(1, kinds=[kind], start=start)[0]
        answer = probe.ask(model, processor, video=clip.pixels, question=clip.question)
        heat = answer.explain()
        assert isinstance(heat, ClipHeatmap)
        shares = heat.over_time / heat.over_time.sum()
        axes = part.subplots(2, len(shares), height_ratios=(3.4, 1), sharey="row")
        part.subplots_adjust(left=0.065, right=0.99, top=0.9, bottom=0.1, wspace=0.05, hspace=0.06)
        part.suptitle(f"{clip.question}   {answer.text.strip()}", fontsize=12, x=0.065, y=0.965, ha="left")
        for number, (above, below) in enumerate(axes.T):
            above.imshow(heat.shown(number, 240, mark=None))
            if clip.moments[number]:
                whole = (0, 240, 0, 240)
                above.contour(clip.mask[number], [0.5], colors="white", linewidths=1, linestyles=":", extent=whole)
            above.set_axis_off()
            below.bar(0, shares[number], color="#c2410c" if clip.moments[number] else "#999999")
            below.set(xticks=[0], xticklabels=[f"frame {number}"], xlim=(-0.6, 0.6))
            below.spines[["top", "right", "left"]].set_visible(False)
            below.tick_params(left=number == 0, length=0, labelsize=9)
            below.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Explain and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/overview.jpg"))
    parser.add_argument("--clips", action="store_true", help="clips and examples/video_model instead")
    options = parser.parse_args()
    if options.clips:
        draw_clips(*probe.load(VIDEO_MODEL), options.out)
        print(options.out)
        return
    model, processor = probe.demo.load()
    with tempfile.TemporaryDirectory() as directory:
        draw([explained(model, processor, kind, index, directory) for kind, index in SCENES], options.out)
    print(options.out)


if __name__ == "__main__":
    main()
