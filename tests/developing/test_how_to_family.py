"""docs/developing/add-a-family.md: what is declared of families is in the shape that the page and the table expect."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lvlm_probe.models.families import Family
from lvlm_probe.models.support import family_table

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "lvlm_probe" / "families.yaml").read_text(encoding="utf-8")
ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
KEYS = {field.name for field in dataclasses.fields(Family)} | {"outside"}
ZOO = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "families" / "members").glob("*.py"))


def fault(name: str, entry: dict[str, Any]) -> str | None:
    """What an entry of ``families.yaml`` lacks, as a sentence."""
    if unknown := set(entry) - KEYS:
        return f"{name}: {sorted(unknown)} are not fields of Family"
    if name not in CONFIG_MAPPING_NAMES and f"| {name} |" not in PAGE:  # whose table may be of a newer transformers
        return f"{name}: transformers has no such model_type; a family of your own is a plugin's"
    reason = entry.get("unsupported") or entry.get("outside")
    if reason and reason not in PAGE:
        return f"{name}: its reason is not in docs/families.md: run `make families`"
    if not reason and f"| {name} |" not in PAGE:
        return f"{name}: docs/families.md has no row of it: run `make families`"
    return None


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_known_keys_and_a_row_on_the_page(name: str) -> None:
    assert fault(name, ENTRIES[name]) is None


def test_a_forgotten_step_is_found() -> None:
    assert "not fields" in str(fault("mllama", {"image_tokens": "none"}))
    assert "plugin" in str(fault("my_vlm", {"image_token": "none"}))
    assert "make families" in str(fault("mllama", {"unsupported": "it was forgotten on the page"}))


def test_the_declaration_of_the_page_works() -> None:
    page = (ROOT / "docs" / "developing" / "add-a-family.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    code += "from lvlm_probe.models.families import family_of\nprint(family_of('my_vlm').decoder)\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "model.language_model\n"), result.stderr


def test_keys_that_an_entry_may_have_are_explained_at_the_top_of_the_file() -> None:
    used = {key for entry in ENTRIES.values() for key in entry}
    explained = set(re.findall(r"^#   ([\w, ]+):", TEXT, re.MULTILINE))
    assert used <= {key for group in explained for key in group.split(", ")}


def test_the_zoo_and_the_shipped_table_hold_the_same_families() -> None:
    """Without building a model; ``tests/families`` builds them all."""
    missing = [family.name for family in family_table().lvlms if f'"{family.name}"' not in ZOO]
    assert not missing, f"no member of the zoo is named {missing}"
