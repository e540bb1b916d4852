"""What `import lvlm_probe` offers, what it costs, and that the modules' imports point one way."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import new_process
import pytest

import lvlm_probe as probe
from lvlm_probe import _moved, errors

PACKAGE = Path(probe.__file__).parent
ROOT = PACKAGE.parent

SURFACE = {
    "Heatmap", "Outcome", "Probe", "ProbeError", "ProbeWarning", "Problem", "Recording", "Replay", "Score",
    "TokenSelection", "Trace", "TraceStore", "attach", "compare", "evaluate", "explain", "import_answers", "load",
    "open_store", "open_trace", "plan", "register_explainer", "register_family", "replay", "report", "select_tokens",
    "verify", "Answer", "ask", "figure", "methods", "open_image", "connect", "Server",
    "import_attention", "Edit", "edit", "score", "Given", "Stream", "widget", "log",
}  # fmt: skip
ROOMS = {"causal", "demo", "errors", "evidence", "metrics", "sanity", "study", "video"}
NEVER_AT_THE_TOP = {"LoadError"}  # younger than the rooms
FORMER = {name: home for name, home in _moved.NAMES.items() if "." not in name}


def modules() -> list[str]:
    return ["lvlm_probe", *(info.name for info in pkgutil.walk_packages([str(PACKAGE)], "lvlm_probe."))]


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def test_public_names_are_the_documented_ones() -> None:
    assert set(probe.__all__) == SURFACE | ROOMS
    tree = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert tree == set(errors.__all__)
    assert set(FORMER) >= tree - SURFACE - NEVER_AT_THE_TOP


@pytest.mark.parametrize("name", sorted(probe.__all__))
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(probe, name)
    assert name in dir(probe)
    assert inspect.getdoc(value)
    assert getattr(probe, name) is value


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_comes_with_the_first_look_at_it(room: str) -> None:
    fresh(f"import lvlm_probe as probe; assert probe.{room}.__name__ == 'lvlm_probe.{room}' and probe.{room}.__doc__")


@pytest.mark.parametrize("name", sorted(FORMER))
def test_a_former_name_of_the_package_warns_where_it_is_used_and_names_the_new_place(name: str) -> None:
    new = f"lvlm_probe.{FORMER[name]}.{name}"
    with pytest.warns(DeprecationWarning, match=re.escape(f"lvlm_probe.{name} has moved to {new};")) as caught:
        value = getattr(probe, name)
    assert value is getattr(importlib.import_module(f"lvlm_probe.{FORMER[name]}"), name)
    assert caught[0].filename == __file__
    assert name not in probe.__all__


@pytest.mark.quick
def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        probe.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", modules())
def test_all_lists_only_what_exists(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name), f"{module}.__all__ names {name}, which is not there"
    assert inspect.getdoc(loaded), f"{module} has no docstring"


def test_after_one_or_two_arguments_everything_is_keyword_only() -> None:
    for name in ("attach", "evaluate", "explain", "open_trace", "replay", "report", "select_tokens"):
        parameters = inspect.signature(getattr(probe, name)).parameters.values()
        positional = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD]
        # replay(trace, model, processor) has three nouns that nobody mixes up.
        assert len(positional) <= (3 if name == "replay" else 2), f"{name} takes {positional} by position"


def test_what_is_imported_on_first_use_is_known_to_type_checkers_and_to_the_reference() -> None:
    tree = ast.parse(Path(probe.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    told = {alias.asname or alias.name for node in imports for alias in node.names}
    assert not set(probe.__all__) - told


def test_import_is_cheap() -> None:
    code = (
        "import sys, lvlm_probe; assert 'importlib.metadata' not in sys.modules;"
        "lvlm_probe.ProbeError; lvlm_probe.errors.MaskError;"
        "from lvlm_probe import errors, words, plugins;"
        "print(sorted({'torch', 'transformers', 'h5py', 'matplotlib', 'PIL', 'numpy', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import_leaves_the_process_as_it_was() -> None:
    code = (
        "import logging, os, warnings, signal\n"
        "before = dict(os.environ), list(warnings.filters), signal.getsignal(signal.SIGINT), logging.root.handlers[:]\n"
        "import lvlm_probe\n"
        "for name in lvlm_probe.__all__: getattr(lvlm_probe, name)\n"
        "lvlm = logging.getLogger('lvlm_probe')\n"
        "assert dict(os.environ) == before[0], set(os.environ) ^ set(before[0])\n"
        "assert signal.getsignal(signal.SIGINT) is before[2]\n"
        "assert [type(handler).__name__ for handler in lvlm.handlers] == ['NullHandler'] and lvlm.level == 0\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert probe.__version__ == project["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {probe.__version__}" in changelog


def test_typed_package() -> None:
    assert (PACKAGE / "py.typed").is_file()


# ----------------------------------------------------------------------------------------------------------- old names


def fresh(code: str) -> str:
    """What a process prints that has imported nothing of ours."""
    done = new_process.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_a_module_is_found_under_its_old_name_with_a_warning(old: str) -> None:
    sys.modules.pop(f"lvlm_probe.{old}", None)
    with pytest.warns(DeprecationWarning, match=re.escape(f"lvlm_probe.{old} has moved to lvlm_probe.")):
        module = importlib.import_module(f"lvlm_probe.{old}")
    assert isinstance(module, types.ModuleType)
    homes = [importlib.import_module(f"lvlm_probe.{home}") for home in _moved.MOVED[old].split()]
    for home in homes:
        names = getattr(home, "__all__", None) or [
            name
            for name, value in vars(home).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == home.__name__
        ]
        for name in names:
            assert any(getattr(module, name) is getattr(one, name) for one in homes if hasattr(one, name))


@pytest.mark.parametrize("old", sorted(_moved.NAMES))
def test_a_name_is_found_in_its_old_module_with_a_warning(old: str) -> None:
    module, _, name = f"lvlm_probe.{old}".rpartition(".")
    with pytest.warns(DeprecationWarning, match="has moved"):
        here = importlib.import_module(module)
        vars(here).pop(name, None)  # a submodule that once had the name may have been imported
        value = getattr(here, name)
    assert value is getattr(importlib.import_module(f"lvlm_probe.{_moved.NAMES[old]}"), name)


def test_nothing_of_ours_uses_an_old_name() -> None:
    imports = "; ".join(f"import {name}" for name in modules())
    fresh(f"import warnings; warnings.filterwarnings('error', message='.*has moved.*'); {imports}")


def test_the_function_report_survives_the_import_of_the_module_that_had_its_name() -> None:
    printed = fresh(
        "import types, lvlm_probe as probe, lvlm_probe.report as r\n"
        "from lvlm_probe.report import report\n"
        "assert isinstance(r, types.ModuleType) and report is r.report\n"
        "try: probe.report([], out='x.html')\n"
        "except probe.errors.ReportError as error: print(error)"
    )
    assert "no heatmaps" in printed


# ------------------------------------------------------------------------------------------------------- one direction


def test_explainers_and_metrics_do_not_know_the_session() -> None:
    for package in ("explainers", "metrics"):
        for path in (PACKAGE / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for forbidden in ("lvlm_probe.recording.probe", "lvlm_probe.hooks", "lvlm_probe.recording.recorder"):
                assert forbidden not in text, f"{path.name} refers to {forbidden}"


def test_hooks_on_modules_are_registered_in_one_module_only() -> None:
    """A hook on a module outlives the call that it is for. One on a tensor (``register_hook``) goes with its graph."""
    for path in source_files():
        if path.name == "hooks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"register_\w+_hook", node.attr):
                pytest.fail(f"{path.relative_to(PACKAGE)}:{node.lineno} calls {node.attr}; only hooks.py does")


# Private modules, which their own rooms import whole.
MODULES = {"_moved", "_version", "_nnsight"}


@pytest.mark.quick
def test_no_private_name_is_imported_from_another_module() -> None:
    """Of attributes ruff says so (SLF001); of names from the same distribution it does not."""
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lvlm_probe":
                private = {alias.name for alias in node.names if re.match("_(?!_)", alias.name)} - MODULES
                where = path.relative_to(PACKAGE).as_posix()
                assert not private, f"{where}:{node.lineno} imports {private}: make it public"


def test_no_module_binds_a_name_twice() -> None:
    """Of functions ruff says so (F811); of constants nobody does, and functions above read the later one."""
    for path in source_files():
        bound = [
            target.id
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        ]
        assert len(set(bound)) == len(bound), f"{path.relative_to(PACKAGE)}: {[n for n in bound if bound.count(n) > 1]}"
