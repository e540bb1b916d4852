"""What `import lvlm_probe` offers, what it costs, and that the modules' imports point one way."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lvlm_probe as probe
from lvlm_probe import errors

PACKAGE = Path(probe.__file__).parent
ROOT = PACKAGE.parent

SURFACE = {
    "attach", "demo", "evaluate", "explain", "load", "open_store", "open_trace", "replay", "report", "select_tokens",
    "Heatmap", "ImagePath", "Probe", "Recording", "Replay", "Score", "TokenSelection", "Trace", "TraceStore",
    "Verification", "verify", "causal", "compare", "register_explainer", "plan", "Plan", "import_answers",
}  # fmt: skip


def modules() -> list[str]:
    return ["lvlm_probe", *(info.name for info in pkgutil.walk_packages([str(PACKAGE)], "lvlm_probe."))]


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def test_public_names_are_the_documented_ones() -> None:
    tree = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    exported = set(probe.__all__)
    assert exported - set(errors.__all__) == SURFACE
    assert tree == set(errors.__all__)


@pytest.mark.parametrize("name", sorted(probe.__all__))
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(probe, name)
    assert name in dir(probe)
    assert inspect.getdoc(value)
    assert getattr(probe, name) is value


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


def test_import_is_cheap() -> None:
    code = (
        "import sys, lvlm_probe; lvlm_probe.ProbeError; from lvlm_probe import errors, words, plugins;"
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


# ------------------------------------------------------------------------------------------------------- one direction

LEVELS = [
    {"errors", "files", "words", "hooks", "family_table", "wrappers"},
    {
        "format", "geometry", "memory", "exhaustion", "plugins", "adapters", "originals", "replica", "isolation",
        "patch_gradient",
    },
    {"images", "trace", "anatomy", "pictures", "identity", "decoding", "attention"},
    {
        "player", "forcing", "layout", "points", "watch", "handed", "recognition", "loading", "chunks", "recorded_path",
        "capture", "rewording", "recorded_inputs", "places", "token_places", "encoder_tokens", "hidden",
    },
    {"selection", "heatmap", "planning"},
    {"explainers", "metrics", "verification", "causal", "_nnsight"},
    {
        "conditions", "recorder", "session", "report", "demo", "logprobs", "masking", "prompt_pictures", "row_inputs",
        "prompting", "importing",
    },
    {"study"},
    {"cli"},
]  # fmt: skip
"""The road, bottom first; a module may import from its own level and below. """


def imported(path: Path) -> set[str]:
    """Names of our modules that a file imports when it is loaded; not those inside functions or for types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module and child.module.startswith("lvlm_probe."):
                found.add(child.module.split(".")[1])
            elif isinstance(child, ast.ImportFrom) and child.module == "lvlm_probe":
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.Import):
                found.update(a.name.split(".")[1] for a in child.names if a.name.startswith("lvlm_probe."))
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_imports_point_one_way() -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    against: list[str] = []
    for path in source_files():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own = parts[0]
        if own in ("__init__", "errors"):
            continue
        assert own in level, f"{own} has no place in LEVELS"
        for name in imported(path):
            if name in level and level[name] > level[own]:
                against.append(f"{'/'.join(parts)} imports {name}")
    assert not against, against


def test_explainers_and_metrics_do_not_know_the_session() -> None:
    for package in ("explainers", "metrics"):
        for path in (PACKAGE / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for forbidden in ("lvlm_probe.session", "lvlm_probe.hooks", "lvlm_probe.recorder"):
                assert forbidden not in text, f"{path.name} refers to {forbidden}"


def test_hooks_are_registered_in_one_module_only() -> None:
    for path in source_files():
        if path.name == "hooks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("_hook"):
                pytest.fail(f"{path.relative_to(PACKAGE)}:{node.lineno} calls {node.attr}; only hooks.py does")
