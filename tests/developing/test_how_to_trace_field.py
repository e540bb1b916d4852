"""docs/developing/add-a-trace-field.md: each field of a trace has what the page asks for; its edits work."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from textwrap import indent

import new_process
import pytest

import lvlm_probe
from lvlm_probe.trace.fields import Field, Json
from lvlm_probe.trace.records import FIELDS
from lvlm_probe.trace.schema import FORMAT_VERSION

ROOT = Path(__file__).parents[2]
PACKAGE = Path(lvlm_probe.__file__).parent
HOW_TO = (ROOT / "docs" / "developing" / "add-a-trace-field.md").read_text(encoding="utf-8")
RECORDING = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "recording").glob("*.py"))
GOLDEN = ROOT / "tests" / "data"


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def faults(name: str, field: Field, recording: str = RECORDING) -> list[str]:
    """What a row lacks, as sentences."""
    said = []
    if not re.search(rf"\b{name}=|\.{name}\b( = |,.* = |\.append\()", recording):
        said.append(f"{name}: nothing in lvlm_probe/recording fills it")
    if version(field.since) > version(FORMAT_VERSION):
        said.append(f"{name} is since {field.since}, and FORMAT_VERSION is {FORMAT_VERSION}")
    if version(field.since) > (1, 0) and not field.optional:
        said.append(f"{name} is newer than 1.0 and not optional: older files lack it")
    if not (GOLDEN / f"golden-{field.since}.h5").is_file():
        said.append(f"{name}: there is no golden file of version {field.since}")
    return said


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_recorded_and_its_version_kept(name: str) -> None:
    assert not faults(name, FIELDS[name])


def test_a_forgotten_step_is_found() -> None:
    said = faults("forgotten", Json("output/forgotten", "text", about="nothing", since="1.9"))
    assert [sentence.split(" ", 1)[1] for sentence in said] == [
        "nothing in lvlm_probe/recording fills it",
        f"is since 1.9, and FORMAT_VERSION is {FORMAT_VERSION}",
        "is newer than 1.0 and not optional: older files lack it",
        "there is no golden file of version 1.9",
    ]


USE = """
import json, sys
import lvlm_probe as probe

model, processor = probe.demo.load()
(scene,) = probe.demo.scenes(1)
inputs = processor.apply_chat_template(
    scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with probe.attach(model, processor) as p, p.record("runs", llr=False) as recording:
    for limit in (3, 24):
        model.generate(**inputs, max_new_tokens=limit, do_sample=False)
for trace in recording.traces:
    trace.verify()
    trace.describe()
old = probe.open_store(sys.argv[1])[0]
print(json.dumps([trace.finish_reason for trace in (*recording.traces, old)]))
"""


def test_the_edits_of_the_page_are_all_the_code_it_takes(tmp_path: Path) -> None:
    """On a copy of the package, which shares all but the edited files with this one."""
    row, argument = (block.split("```")[0] for block in HOW_TO.split("```python\n")[1:3])
    copy = tmp_path / "lvlm_probe"
    copy.mkdir()
    for item in PACKAGE.iterdir():
        if item.name in ("trace", "recording"):
            shutil.copytree(item, copy / item.name)
        elif item.name == "SPEC.md":
            shutil.copy(item, copy)
        else:
            (copy / item.name).symlink_to(item)

    def edit(path: str, before: str, after: str) -> None:
        text = (copy / path).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} has changed: say so on the page"
        (copy / path).write_text(text.replace(before, after), encoding="utf-8")

    edit("trace/records.py", "\n    error: Annotated[", f"\n{indent(row, 4 * ' ')}    error: Annotated[")
    last = "            meta=dict(self.options.meta),\n"
    edit("recording/recorder.py", last, last + indent(argument, 12 * " "))
    edit("trace/schema.py", f'FORMAT_VERSION = "{FORMAT_VERSION}"', 'FORMAT_VERSION = "1.1"')

    def python(code: str, argument: str) -> str:
        result = new_process.run(code, argument, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert result.returncode == 0, result.stderr
        return result.stdout

    shutil.copy(ROOT / "tests" / "trace" / "spec_table.py", tmp_path)
    python("import runpy; runpy.run_path('spec_table.py', run_name='__main__')", "--write")
    assert "| `output/finish_reason` ? | JSON text |  | 1.1 |" in (copy / "SPEC.md").read_text(encoding="utf-8")
    said = python(USE, str(GOLDEN / "golden-1.0.h5"))
    assert json.loads(said.splitlines()[-1]) == ["limit", "token", None]
