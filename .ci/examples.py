"""Runs the programs of examples/ as their first lines say, on small things, each in a process of its own.

python .ci/examples.py FOLDER        # what `make test` does; FOLDER is for what they write
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES.parent / "tests"))

import new_process  # noqa: E402

import lvlm_probe as probe  # noqa: E402

PROGRAM = (
    "import runpy, sys; sys.path[0] = {folder!r}; sys.argv[0] = {path!r}; runpy.run_path({path!r}, {{}}, '__main__')"
)


def commands(folder: Path) -> dict[str, list[str]]:
    """Program → its arguments."""
    (scene,) = probe.demo.scenes(1)
    scene.image.save(folder / "scene.png")
    return {
        "own_model": [str(probe.demo.path()), str(folder / "scene.png"), scene.question, str(folder / "own_model")],
        "own_explainer": [str(folder / "own_explainer")],
        "why_not_blue": [str(folder / "why_not_blue.jpg")],
        "without_this": [str(folder / "without_this.jpg")],
        "evidence_pictures": ["modalities", "steps", "--out", str(folder / "pictures")],
        "own_score_robot": [str(folder / "own_score_robot")],
        "own_score_retrieval": [str(folder / "own_score_retrieval")],
        "overview_picture": ["--out", str(folder / "overview.jpg")],
        "evaluate_demo_model": ["--n", "5", "--llr-scenes", "5", "--threads", "1"],
        # A few steps of every stage, on a few scenes: the recipe runs, the weights are not to be looked at.
        "train_demo_model": ["--scale", "0.002", "--pool", "64", "--threads", "1", "--out", str(folder / "trained")],
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, arguments in commands(folder).items():
        path = EXAMPLES / f"{name}.py"
        done = new_process.run(PROGRAM.format(folder=str(EXAMPLES), path=str(path)), *arguments, env=os.environ)
        print(f"== {path.name} {' '.join(arguments)}", done.stdout, done.stderr, sep="\n")
        failed += [name] * (done.returncode != 0)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
