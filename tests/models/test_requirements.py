"""What a model's processor needs and this installation lacks, as one sentence with what to type."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_models
from transformers.utils import is_torchvision_available

import lvlm_probe as probe
from lvlm_probe.errors import LoadError
from lvlm_probe.models.requirements import EXTRAS, Missing, missing_library

ROOT = Path(__file__).parents[2]
without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed here")

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llava", tmp_path_factory.mktemp("saved"))


def renamed(saved: Path, where: Path, **settings: str) -> Path:
    """The saved model with another processor class, or image processor class, named in its files."""
    where.mkdir()
    for file in saved.iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "processor_config.json").read_text())
    if image := settings.pop("image_processor_type", None):
        config["image_processor"]["image_processor_type"] = image
    (where / "processor_config.json").write_text(json.dumps(config | settings))
    return where


@without_torchvision
@pytest.mark.parametrize(
    ("settings", "library", "part"),
    [
        ({"processor_class": "PixtralProcessor"}, "torchvision", "PixtralProcessor"),
        ({"image_processor_type": "Cohere2VisionImageProcessor"}, "torchvision", "Cohere2VisionImageProcessor"),
        ({"processor_class": "SmolVLMProcessor"}, "num2words", "SmolVLM"),
    ],
)
def test_a_processor_without_its_library_is_refused_in_a_sentence(settings, library, part, saved, tmp_path):
    model = renamed(saved, tmp_path / "model", **settings)
    with pytest.raises(LoadError) as refusal:
        probe.load(model)
    assert f'{part} needs {library}, which is not installed: pip install "lvlm-probe[{library}]"' in str(refusal.value)
    assert refusal.value.__cause__ is not None
    assert missing_library(refusal.value) == Missing(library, part)


def test_a_library_that_does_not_import_is_named_with_the_reason(tmp_path):
    """The commonest broken environment: a torchvision made for another torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    described = tmp_path / "torchvision-0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n"
        "import lvlm_probe as probe\nfrom lvlm_probe.models.requirements import missing_library\n"
        "try: probe.demo.load()\n"
        "except probe.errors.LoadError as error:\n"
        "    print(error, repr(error.__cause__.__cause__), missing_library(error).library, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, cause, found = done.stdout.splitlines()
    assert "torchvision 0.1 is installed and cannot be imported beside torch" in said
    assert "operator torchvision::nms does not exist" in said and "pip uninstall torchvision" in said
    assert cause.startswith("RuntimeError") and found == "torchvision"


@pytest.mark.parametrize("error", [ValueError("a shape is wrong"), OSError("no such file"), KeyError("torchvision")])
def test_what_is_no_library_is_not_taken_for_one(error):
    assert missing_library(error) is None


def test_a_module_that_is_not_there_is_named():
    try:
        import no_such_library.inner  # noqa: F401
    except ImportError as error:
        outer = ValueError("the model cannot be made")
        outer.__cause__ = error
        assert missing_library(outer) == Missing("no_such_library")
        assert str(missing_library(outer)).endswith("pip install no_such_library")


@pytest.mark.parametrize("name", EXTRAS)
def test_every_library_that_is_said_to_be_an_extra_is_one(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras[name] == [name]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/nope", "no model directory at /nope"),
        ("./no/such/model", "no model directory at ./no/such/model"),
        (Path("nope/nope"), "no model directory at nope/nope"),
        (__file__, "is a file; a model is a directory"),
        (str(Path(__file__).parent), "has no config.json"),
        ("a\0b", "NUL"),
    ],
)
def test_what_is_no_model_is_told_before_any_library_is_asked(source, said, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a path went to the network"))
    with pytest.raises(LoadError, match=said):
        probe.load(source)
