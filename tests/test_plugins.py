"""The plugin loader, on real distributions written to a temporary folder of ``sys.path``."""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import new_process
import pytest
from command_line import succeed
from plugin_site import Install

from lvlm_probe import explainers, plugins
from lvlm_probe.errors import ExplainError, ProbeWarning
from lvlm_probe.explainers import registry

TEMPLATE = Path(__file__).parents[1] / "integrations" / "template"

PIP_INSTALL = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")


REGISTERS = """
from lvlm_probe.explainers import Outcome, register
calls = []
def register_all():
    calls.append(1)
    @register("from_plugin")
    def from_plugin(problem, *, size=3):
        return Outcome(None, reason="only a test")
"""


def test_importing_the_package_loads_no_plugin(install: Install) -> None:
    install("dist-good", "good", "good_plugin:register_all", source=REGISTERS)
    path = os.pathsep.join(sys.path)
    code = "import sys, lvlm_probe, lvlm_probe.plugins, lvlm_probe.explainers; print('good_plugin' in sys.modules)"
    result = new_process.run(code, env={**os.environ, "PYTHONPATH": path})
    assert result.stdout.strip() == "False", result.stderr


def test_a_plugin_is_loaded_once_and_registers(install: Install) -> None:
    install("dist-good", "good", "good_plugin:register_all", source=REGISTERS)
    assert "from_plugin" not in registry.METHODS
    loaded = plugins.load_plugins()
    assert loaded["good"] == plugins.Plugin("good", "good_plugin:register_all", "dist-good 1.2")
    assert loaded["good"].loaded
    assert "from_plugin" in registry.METHODS
    plugins.load_plugins()
    assert sys.modules["good_plugin"].calls == [1]


def test_a_module_can_be_the_plugin(install: Install) -> None:
    source = "from lvlm_probe.explainers import register\n@register('by_import')\ndef by_import(problem): ...\n"
    install("dist-module", "bare", "bare_plugin", source=source)
    assert plugins.load_plugins()["bare"].loaded
    assert "by_import" in registry.METHODS


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("def register_all():\n    raise RuntimeError('out of luck')\n", "RuntimeError: out of luck"),
        ("def something_else(): ...\n", "AttributeError"),
        ("register_all = 7\n", "has to be a module or a callable"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("def register_all(:\n", "SyntaxError"),
        (
            "from lvlm_probe.explainers import register\n"
            "def register_all():\n    register('igos++')(lambda problem: None)\n",
            "the name 'igos++' is taken",
        ),
    ],
)
def test_a_broken_plugin_warns_and_the_others_load(install: Install, source: str, said: str) -> None:
    install("dist-broken", "broken", "broken_plugin:register_all", source=source)
    install("dist-good", "good", "good_plugin:register_all", source=REGISTERS)
    with pytest.warns(ProbeWarning, match="plugin 'broken' of dist-broken 1.2 is skipped") as caught:
        loaded = plugins.load_plugins()
    (ours,) = (one for one in caught if one.category is ProbeWarning)  # what others left open warns when it goes
    assert said in str(ours.message)
    assert not loaded["broken"].loaded
    assert said in str(loaded["broken"].error)
    assert loaded["good"].loaded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins.load_plugins()


def test_two_plugins_of_one_name_warn_and_the_first_by_distribution_is_kept(install: Install) -> None:
    install("dist-b", "twice", "second_plugin:register_all", source="def register_all(): raise AssertionError\n")
    install("dist-a", "twice", "first_plugin:register_all", source=REGISTERS)
    with pytest.warns(
        ProbeWarning, match=r"2 plugins are called 'twice': dist-a 1.2 .* and dist-b 1.2 .*dist-a 1.2 is used"
    ):
        loaded = plugins.load_plugins()
    assert loaded["twice"].distribution == "dist-a 1.2"
    assert "second_plugin" not in sys.modules


def test_a_plugin_that_looks_into_the_registry_while_loading_does_not_recurse(install: Install) -> None:
    source = "from lvlm_probe.plugins import load_plugins\ndef go(): go.saw = dict(load_plugins())\n"
    install("dist-a", "a_curious", "curious_plugin:go", source=source)
    assert plugins.load_plugins()["a_curious"].loaded
    assert sys.modules["curious_plugin"].go.saw == {}


@pytest.mark.quick
@pytest.mark.parametrize("look", ["resolve", "needs_of", "follows_score", "stands_for", "summary_of"])
def test_whoever_asks_first_finds_a_plugin_method(install: Install, look: str) -> None:
    install("dist-good", "good", "good_plugin:register_all", source=REGISTERS)
    from lvlm_probe.explainers import registry

    getattr(registry, look)("from_plugin")
    assert registry.resolve("from_plugin").__module__ == "good_plugin"


def test_the_template_plugin_really_installs_and_explains(tmp_path: Path) -> None:
    """pip-installed to a folder of its own, and used in a fresh process through ``explain(method="quadrants")``."""
    site = tmp_path / "site"
    source = shutil.copytree(TEMPLATE, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    subprocess.run(
        [*PIP_INSTALL, "--target", str(site), str(source)],
        check=True,
    )
    code = """
import lvlm_probe as probe, sys, torch
torch.set_num_threads(1)
model, processor = probe.demo.load()
scene = probe.demo.scenes(1)[0]
inputs = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
with probe.attach(model, processor) as p, p.record(sys.argv[1]) as recording:
    model.generate(**processor.apply_chat_template(scene.messages, **inputs), max_new_tokens=32)
replay = probe.replay(recording.traces[-1], model, processor)
heat = probe.explain(replay, method="quadrants", levels=3)
assert heat.method == "quadrants" and heat.shape == (8, 8), heat
assert heat.values.max() > 0.9 and heat.provenance["passes"]["forward"] >= 1 + 4 + 2 * 16
import numpy as np
rows, cols = np.nonzero(scene.mask)
height, width = scene.mask.shape
row, col = np.unravel_index(heat.values.argmax(), heat.shape)
near = ((rows / height * 8 - row - .5) ** 2 + (cols / width * 8 - col - .5) ** 2).min()
print("distance", near ** .5)
"""
    result = new_process.run(code, str(tmp_path / "runs"), env={**os.environ, "PYTHONPATH": str(site)})
    assert result.returncode == 0, result.stderr
    # The strongest cell lies on, or next to, the object that decides the answer.
    assert float(result.stdout.split("distance")[1]) < 1.5


# ---------------------------------------------------------------------------------------------- plugins that mean harm


EXPLAINER = "from lvlm_probe.explainers import register\n"
DATASET = "from lvlm_probe.study.datasets.registry import register_dataset\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Rude(BaseException): pass\nraise Rude('away')\n", "Rude: away"),
        ("class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute\n", "Mute"),
        (f"{EXPLAINER}register(5)(7)\n", "has a name that can be typed, not 5"),
        (f"{EXPLAINER}register('x')(7)\n", "an explainer 'x' is a function, not int"),
        (f"{EXPLAINER}register('a\\x1b[2J')(lambda problem: None)\n", "can be typed"),
        (f"{EXPLAINER}register('x')(lambda: None)\n", "takes no problem"),
        (f"{EXPLAINER}register('x', needs=5)(lambda problem: None)\n", "list of words"),
        (f"{EXPLAINER}register('x', needs=[[1]])(lambda problem: None)\n", "list of words"),
        (f"{DATASET}register_dataset(5, layout='')(7)\n", "can be typed"),
        (f"{DATASET}register_dataset('x', layout='')(7)\n", "is a function"),
        ("from lvlm_probe.study.run.engines import register_engine as add\nadd('x', 7)\n", "is a function, not int"),
        ("from lvlm_probe.models.families import register_family as add\nadd(5, 7)\n", "can be typed"),
        (
            "from lvlm_probe.models.drivers import register_original as add\nadd('x', matches=1, adapt=2)\n",
            "is a function",
        ),
    ],
)
def test_a_plugin_at_fault_is_named_and_leaves_nothing_behind(install: Install, source: str, said: str) -> None:
    install("dist-bad", "bad", "bad_plugin", source=source)
    install("dist-good", "good", "good_plugin:register_all", source=REGISTERS)
    before = set(registry.METHODS)
    with pytest.warns(ProbeWarning, match="plugin 'bad' of dist-bad 1.2 is skipped") as caught:
        loaded = plugins.load_plugins()
    assert said in str(caught[0].message)
    assert loaded["good"].loaded
    assert set(registry.METHODS) == before | {"from_plugin"}
    assert all(isinstance(name, str) for name in explainers.methods())
    assert "from_plugin" in succeed("methods").out


def test_ctrl_c_while_a_plugin_loads_names_it_and_the_rest_loads_later(install: Install) -> None:
    source = "import builtins as b\nif not hasattr(b, 'came_back'):\n    b.came_back = 1\n    raise KeyboardInterrupt\n"
    install("dist-hangs", "hangs", "hanging_plugin", source=source)
    install("dist-good", "good", "good_plugin:register_all", source=REGISTERS)
    try:
        with pytest.warns(ProbeWarning, match="stopped while loading plugin 'hangs' of dist-hangs 1.2"):
            with pytest.raises(KeyboardInterrupt):
                plugins.load_plugins()
        assert set(plugins.load_plugins()) >= {"hangs", "good"}
    finally:
        del builtins.came_back  # type: ignore[attr-defined]


def test_a_distribution_whose_entry_points_cannot_be_read(install: Install, tmp_path: Path) -> None:
    install("dist-torn", "torn", "torn_plugin")
    (tmp_path / "site" / "dist_torn-1.2.dist-info" / "entry_points.txt").write_bytes(b"[x]\n\xff\xfe = a:b\n")
    importlib.invalidate_caches()
    with pytest.warns(ProbeWarning, match="no plugin is loaded: the entry points"):
        assert not plugins.load_plugins()


def test_what_is_registered_need_not_be_a_plain_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))

    class Method:
        """Explains. And more."""

        def __call__(self, problem: object, *, size: int = 3) -> None: ...

    def function(problem: object, *, size: int, other: int) -> None: ...

    registry.register("object")(Method())  # type: ignore[arg-type]
    registry.register("partial")(functools.partial(function, other=1))  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match=r"the name 'object' is taken by .*Method"):
        registry.register("object")(function)  # type: ignore[arg-type]
    shown = {row["method"]: row for row in succeed("methods", "--json").json}
    assert shown["object"]["parameters"] == ["size"]
    assert "partial" in succeed("methods").out
