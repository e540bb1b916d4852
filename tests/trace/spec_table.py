"""The version and the members of a trace in ``SPEC.md``, made from the table of fields.

python tests/trace/spec_table.py --write
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lvlm_probe
from lvlm_probe.trace.records import FIELDS
from lvlm_probe.trace.schema import FORMAT_VERSION

SPEC = Path(lvlm_probe.__file__).parent / "SPEC.md"
BEGIN, END = "<!-- made by tests/trace/spec_table.py from trace/records.py -->", "<!-- end -->"


def table() -> str:
    """The lines between the marks: every field, its type and shape in the file, and what it is."""
    lines = ["| member | type | shape | since | |", "|---|---|---|---|---|"]
    for field in FIELDS.values():
        kind, shape = field.described
        optional = " ?" if field.optional else ""
        lines.append(f"| `{field.key}`{optional} | {kind} | {shape} | {field.since} | {field.about} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """``SPEC.md`` with the version and the table of today."""
    named = r'(# The lvlm_probe trace format, version |@format_version "|^lvlm_probe\.trace )\d+\.\d+'
    text = re.sub(named, lambda found: found[1] + FORMAT_VERSION, text, flags=re.MULTILINE)
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    made = with_table(SPEC.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        SPEC.write_text(made, encoding="utf-8", newline="\n")
    else:
        print(table())
