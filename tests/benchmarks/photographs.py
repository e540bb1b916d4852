"""Photographs to judge maps on: cut-out objects on photographs, with exact masks, and plain photographs.

    python tests/benchmarks/photographs.py --cut-outs DIR --backgrounds DIR --plain DIR --out runs/photographs
    python tests/benchmarks/tournament.py --cases runs/photographs --model DIR --scenes 140 --few greedy,rise

Objects are put together by ``examples/real_parts/scenes.py``: one (what is in the picture?) or two (what is on the
left, on the right, at the top, at the bottom?), each scene a function of its number. Where the packages come from, and
what their licences are, is said in ``examples/real_parts``. Plain photographs are asked what is in them, and every
answer is taken: nobody has marked what it should need, so that they count for deletion, insertion and the verdict
alone.

Kinds take turns, plain photographs among them, so that the first N of the cases are a sample of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
QUESTION = "What is in the picture?"
SIDE = 512
"""Longest side of a plain photograph, pixels."""
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_FIRST = 9_000_000
"""Seed of the first scene: none that a model is trained on."""


def opened(folder: Path) -> list[Image.Image]:
    """The photographs under a folder, in order of their names, none larger than ``SIDE``."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS):
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        found.append(picture)
    return found


def composites(cut_outs: Sequence[Any], backgrounds: Sequence[Image.Image]) -> Iterator[dict[str, Any]]:
    """Scenes without end: one object, two side by side or above each other, one of them asked for."""
    scenes = recipe()
    for number in itertools.count():
        rng = random.Random(_FIRST + number)
        chosen = rng.sample(list(cut_outs), 1 if number % 3 == 0 else 2)
        if len({cut.word for cut in chosen}) < len(chosen):
            continue
        scene = scenes.compose(rng, chosen, backgrounds)
        asked = scene.objects[rng.randrange(len(scene.objects))]
        question = QUESTION
        if asked.place:
            question = f"What is {'on' if asked.place in ('left', 'right') else 'at'} the {asked.place}?"
        yield {
            "picture": scene.image,
            "region": asked.mask,
            "question": question,
            "words": [asked.word],
            "kind": asked.place or "alone",
        }


def recipe() -> Any:
    """``examples/real_parts/scenes.py``."""
    folder = ROOT / "examples" / "real_parts"
    if not (folder / "scenes.py").is_file():
        raise SystemExit(f"there is no {folder / 'scenes.py'}: it puts the photographs together")
    sys.path.insert(0, str(folder))
    import scenes

    return scenes


def mixed(first: Iterator[dict[str, Any]], plain: Sequence[Image.Image], count: int) -> Iterator[dict[str, Any]]:
    """``count`` composites with the plain photographs spread among them."""
    photographs = [{"picture": image, "region": None, "question": QUESTION, "words": []} for image in plain]
    for number in range(count):
        yield next(first)
        share = [len(photographs) * done // count for done in (number, number + 1)]
        yield from ({**photograph, "kind": "photograph"} for photograph in photographs[slice(*share)])


def write(found: Iterator[dict[str, Any]], out: Path) -> int:
    """Write cases into a folder, as ``held_out.stored`` reads them; return how many."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, case in enumerate(found):
        record = {key: case[key] for key in ("question", "words", "kind")} | {"image": f"{number:04}.png", "mask": None}
        case["picture"].save(out / record["image"])
        if case["region"] is not None:
            record["mask"] = f"{number:04}-mask.png"
            Image.fromarray(np.uint8(255) * case["region"].astype(np.uint8)).save(out / record["mask"])
        lines.append(json.dumps(record) + "\n")
    (out / "cases.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut-outs", type=Path, required=True, help="folder of the cut-outs named in names.txt")
    parser.add_argument("--only", type=Path, help="a file of stems, one a line: of the cut-outs that may be used")
    parser.add_argument("--backgrounds", type=Path, required=True, help="folder of photographs to put them on")
    parser.add_argument("--plain", type=Path, help="folder of photographs to be taken as they are")
    parser.add_argument("--composites", type=int, default=300, help="how many; wrong answers are passed over later")
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"))
    arguments = parser.parse_args()
    scenes = recipe()
    cut_outs = scenes.cut_outs(arguments.cut_outs, scenes.names())
    if arguments.only is not None:
        stems = set(arguments.only.read_text(encoding="utf-8").split())
        cut_outs = [cut for cut in cut_outs if cut.stem in stems]
    plain = [] if arguments.plain is None else opened(arguments.plain)
    count = write(
        mixed(composites(cut_outs, opened(arguments.backgrounds)), plain, arguments.composites), arguments.out
    )
    print(f"{count} cases in {arguments.out}: {len(cut_outs)} cut-outs, {len(plain)} plain photographs")


if __name__ == "__main__":
    main()
