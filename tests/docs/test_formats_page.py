"""Every example of ``docs/guides/formats.md`` and of ``--help`` is imported as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import run

import lvlm_probe as probe
from lvlm_probe.cli.shared.rows import FORMATS
from lvlm_probe.importing import import_answers, row_files, shapes

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "formats.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(json|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
HELP = [("json", example) for _, example in FORMATS.values()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    scenes = probe.demo.scenes(40, kinds=["colour"])
    scene = next(
        one for one in scenes if (one.question, one.answer) == ("What color is the triangle?", "The triangle is red.")
    )
    (folder / "images").mkdir()
    for name in ("photo.jpg", "images/0.jpg"):
        scene.image.save(folder / name, quality=95)
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES) + len(HELP)))
def test_an_example_is_taken(number: int, demo: Any, place: Path) -> None:
    language, text = [*EXAMPLES, *HELP][number]
    file = place / f"{number}.{language}"
    file.write_text(json.dumps(json.loads(text)) if language == "json" else text, encoding="utf-8")
    out = place / f"out{number}"
    result = import_answers(file, *demo, out, images=place / "images", llr=False, attention=False)
    assert not result.rejected and len(result.imported) == 1
    trace = probe.open_trace(result.imported[0].path)
    assert (trace.question, trace.answer.strip()) == ("What color is the triangle?", "The triangle is red.")
    assert trace.log_probs.sum() > -1.0, "these are not the tokens that the model would have said"


def test_every_format_has_an_example() -> None:
    assert list(FORMATS) == sorted(shapes.SHAPES, key=list(FORMATS).index)
    assert {f"`{name}`" for name in (*FORMATS, *row_files.FILES)} <= set(re.findall(r"`[\w-]+`", PAGE))
    for command in ("import", "meter"):
        shown = "".join(run(command, "--help").out.split())
        for name, (words, example) in FORMATS.items():
            assert "".join(f"{name}: {words}".split()) in shown
            assert "".join(example.split()) in shown
