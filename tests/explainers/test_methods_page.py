"""A method is one file: what follows from its being there, and its row of docs/methods.md, compared with the code."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import lvlm_probe as probe
from lvlm_probe.explainers import needs_of, registry

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
QUICK = {
    "rise": {"masks": 16},
    "greedy": {"regions": 9, "segments": "grid"},
    "occlusion": {"size": 5},
    "integrated_gradients": {"steps": 3},
}
COLUMNS = ("passes", "gradients", "attention", "activations")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> probe.Replay:
    model, processor = probe.demo.load()
    (scene,) = probe.demo.scenes(1, split="tune", seed=5, kinds=["colour"])
    with probe.attach(model, processor) as p, p.record(tmp_path_factory.mktemp("methods")) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    return probe.replay(recording.traces[0], model, processor)


def rows() -> dict[str, tuple[list[str], str]]:
    """Method → its cells "yes" or "", and what the last column says."""
    found: dict[str, tuple[list[str], str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 7:
            for name in re.findall(r"`([^`]+)`", cells[0]):
                found[name] = (cells[2:6], cells[6])
    return found


def built_in() -> list[str]:
    return [name for name in registry.names() if registry.resolve(name).__module__.startswith("lvlm_probe.explainers.")]


@pytest.mark.quick
def test_the_page_has_a_row_for_every_method_of_the_package_and_no_other() -> None:
    assert set(rows()) == set(built_in())


def test_every_method_declares_its_cost_and_says_what_it_is() -> None:
    for name in built_in():
        assert registry.METHODS[name].cost is not None, f"{name} has no cost: @register({name!r}, cost=...)"
        module = sys.modules[registry.resolve(name).__module__]
        assert inspect.getdoc(registry.resolve(name)) and inspect.getdoc(module), name


def test_a_method_is_there_because_its_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_room_of_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "corner.py").write_text(
        "from lvlm_probe.explainers.registry import Cost, register\n"
        "@register('corner of a file', needs=(), cost=lambda problem, params: Cost(None, params['count'], 0, ()))\n"
        "def corner(problem, *, count=3): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    registry.discover([str(package)], "a_room_of_methods")
    assert "corner of a file" in registry.names()
    problem = registry.Problem(None, None)  # type: ignore[arg-type]
    assert [registry.cost_of("corner of a file", problem, given).forward for given in ({}, {"count": 7})] == [3, 7]


@pytest.mark.parametrize("name", built_in())
def test_a_heatmaps_parameters_make_the_same_heatmap_again(replayed: probe.Replay, name: str) -> None:
    first = probe.explain(replayed, method=name, seed=5, **QUICK.get(name, {}))
    stored = json.loads(json.dumps(dict(first.params)))
    again = probe.explain(
        replayed.over(first.provenance["baseline"]),
        method=name,
        tokens=first.selection,
        seed=5,
        strengthen=False,
        **stored,
    )
    assert again.params == first.params
    np.testing.assert_array_equal(first.values, again.values)


def test_the_page_says_what_each_method_needs() -> None:
    for name, (cells, alone) in rows().items():
        assert {column for column, cell in zip(COLUMNS, cells, strict=True) if cell == "yes"} == set(needs_of(name)), (
            name
        )
        assert bool(alone) == (not {"passes", "gradients"} & needs_of(name)), name
