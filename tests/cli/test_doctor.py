"""``lvlm-probe doctor``: it finds what does not work, names the command that mends it, and never fails itself."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command_line import run, succeed
from transformers.utils import import_utils

import lvlm_probe as probe
from lvlm_probe.cli.shared.checkup import Finding, mending
from lvlm_probe.models import loading
from lvlm_probe.planning import meter, show_bytes


def named(findings: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in findings}


def test_a_healthy_model_is_tried_and_every_method_runs() -> None:
    result = succeed("doctor", "demo", "--json").json
    found = named(result["findings"])
    assert result["ok"] and result["mend"] == []
    assert found["torch"]["text"] == metadata.version("torch")  # torch itself may add what it was built for
    model, _ = probe.demo.load()
    assert show_bytes(sum(weight.nbytes for weight in model.parameters())) in found["memory"]["text"]
    assert "attention by sdpa" in found["memory"]["text"]
    assert "64 image tokens" in found["recorded"]["text"]
    assert "3 layers × 1 heads" in found["recorded"]["text"]
    assert found["boxes"]["text"].startswith("known for 64 of 64")
    count = len(probe.methods())
    assert found["methods"]["text"].startswith(f"{count} of {count}")
    assert "<image>×64" in found["prompt"]["text"] and "What is in the image?" in found["prompt"]["text"]


def test_a_torchvision_that_does_not_match_torch_is_found_and_mended_by_one_command(tmp_path: Path) -> None:
    # As released: metadata that pin torch, and an import that raises whatever the C++ half says.
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    about = tmp_path / "torchvision-0.9.0.dist-info"
    about.mkdir()
    facts = ("Metadata-Version: 2.1", "Name: torchvision", "Version: 0.9.0", "Requires-Dist: torch (==1.8.0)", "")
    (about / "METADATA").write_text("\n".join(facts))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(Path(probe.__file__).parents[1]))])
    done = subprocess.run(
        [sys.executable, "-m", "lvlm_probe", "doctor", "demo", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    found = named(result["findings"])
    assert "torchvision::nms" in found["torchvision"]["text"] and "==1.8.0" in found["torchvision"]["text"]
    public = metadata.version("torch").partition("+")[0]
    assert result["mend"] == [f"pip install --upgrade torchvision torch=={public}"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_processor_that_needs_a_library_says_so(library: str) -> None:
    with mock.patch.dict(import_utils.BACKENDS_MAPPING):
        _, template = import_utils.BACKENDS_MAPPING[library]
        import_utils.BACKENDS_MAPPING[library] = (lambda: False, template)
        with pytest.raises(ImportError) as raised:
            import_utils.requires_backends(type("SmolVLMVideoProcessor", (), {}), [library])
        with mock.patch.object(loading, "load_processor", side_effect=raised.value):
            result = run("doctor", "demo", "--json")
    assert result.code == 1
    found = named(result.json["findings"])
    assert found["processor"]["state"] == "mend" and found["answer"]["text"].startswith("not tried")
    assert f"SmolVLMVideoProcessor needs {library}, which is not installed" in found["processor"]["text"]
    assert result.json["mend"] == [shlex.join(["pip", "install", f"lvlm-probe[{library}]"])]


def test_a_library_out_of_range_and_one_that_is_missing_go_into_one_command() -> None:
    versions = {"transformers": "5.1.0", "h5py": None}
    from lvlm_probe.cli.shared import checkup

    real = checkup.version_of
    with mock.patch.object(checkup, "version_of", lambda name: versions.get(name, real(name))):
        result = run("doctor", "--json")
    assert result.code == 1
    (command,) = result.json["mend"]
    assert command.startswith("pip install ") and "transformers" in command and "h5py" in command


def test_weights_that_do_not_fit_are_not_loaded() -> None:
    with mock.patch.object(meter, "available", return_value=1_000_000):
        result = run("doctor", "demo", "--json")
    found = named(result.json["findings"])
    assert result.code == 1
    assert found["memory"]["state"] == "mend" and "--dtype" in found["memory"]["text"]
    assert found["answer"]["text"].startswith("not tried")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("spec", "said"),
    [("/no/such/place", "no model directory at"), ("demo\0", "NUL"), ("text only", "no vision-language model")],
)
def test_no_model_or_another_kind_is_a_finding(spec: str, said: str, tmp_path: Path) -> None:
    if spec == "text only":
        from transformers import BertConfig

        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
        spec = str(tmp_path)
    result = run("doctor", spec)
    assert result.code == 1
    assert said in " ".join(result.out.split()) and "does not work" in result.out


def test_a_check_that_raises_is_a_finding() -> None:
    with mock.patch.object(torch.cuda, "is_available", side_effect=RuntimeError("driver is gone")):
        result = run("doctor", "--json")
    assert result.code == 1
    assert "driver is gone" in named(result.json["findings"])["device"]["text"]


def test_options_of_pip_for_one_part_are_not_those_of_another() -> None:
    found = [
        Finding("h5py", "mend", "", ("h5py>=3",)),
        Finding("torchvision", "mend", "", ("--force-reinstall", "--no-deps", "torchvision==1")),
        Finding("numpy", "mend", "", ("numpy", "h5py>=3")),
        Finding("extras", "note", "", ("nothing",)),
    ]
    commands = ["pip install 'h5py>=3' numpy", "pip install --force-reinstall --no-deps torchvision==1"]
    assert mending(found) == commands
