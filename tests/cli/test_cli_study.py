"""The commands that go on with a study, say how far it is, and hand it on; the others are beside what they show."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from command_line import run, succeed

from lvlm_probe.cli.shared.terminal import quoted_path

STUDY = """\
models: {demo: demo}
datasets: {scenes: {reader: demo, source: eval, limit: 2}}
methods: {center: {}}
settings: {grid: 8, steps: 4, max_new_tokens: 24}
"""


def test_status_resume_and_export(tmp_path: Path) -> None:
    file, out = tmp_path / "my study.yaml", tmp_path / "out"
    file.write_text(STUDY, encoding="utf-8")
    before = succeed("study", "status", file, "--json").json
    said = succeed("study", "resume", file).out
    assert f"next:  lvlm-probe study table {quoted_path(file)}\n" in said and quoted_path(file).startswith("'")
    after = succeed("study", "status", file, "--json").json
    assert before != after
    assert "answers" in succeed("study", "status", file).out
    written = sorted((tmp_path / "runs").rglob("*.json*"))
    stamps = [path.stat().st_mtime_ns for path in written]
    succeed("study", "resume", file)
    assert stamps and [path.stat().st_mtime_ns for path in written] == stamps, "what was done was done again"

    shown = succeed("study", "export", file, "--out", out).out.split()
    assert {Path(line).name for line in shown} == {path.name for path in out.iterdir()}
    with (out / "answers.csv").open(encoding="utf-8", newline="") as rows:
        assert len(list(csv.DictReader(rows))) == 2
    assert run("study", "export", tmp_path / "none.yaml").code == 2


@pytest.mark.quick
@pytest.mark.parametrize("command", ["export", "page", "status", "resume"])
def test_a_study_that_is_not_there(command: str, tmp_path: Path) -> None:
    missing = run("study", command, tmp_path / "none.yaml")
    assert missing.code == 2 and "none.yaml" in missing.err
