"""A processor without its video processor, as it is made where torchvision is missing, is the whole one for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import picture
from zoo import MEMBERS, load_members, save

from lvlm_probe.models import loading
from lvlm_probe.models.prompts import chat_inputs, prompt_rule

load_members()
VIDEO = ("gemma4", "glm_ocr", "cosmos3_omni", "minicpmv4_6", "llava_next_video", "video_llava", "dots3_note")


@pytest.mark.parametrize("name", VIDEO)
def test_images_are_prepared_bit_for_bit_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(name, tmp_path / "model")
    whole = loading.load_processor(saved)

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("the video processor requires the Torchvision library")

    with monkeypatch.context() as patched:
        patched.setattr(transformers.AutoProcessor, "from_pretrained", missing)
        patched.setattr(transformers.utils, "is_torchvision_available", lambda: False)
        part = loading.load_processor(saved)
    assert not isinstance(part.video_processor, transformers.BaseVideoProcessor)
    assert type(part.image_processor) is type(whole.image_processor)
    rule = prompt_rule(whole)
    image = picture(*MEMBERS[name].size)
    ours, theirs = (chat_inputs(one, [image], "What?", rule=rule) for one in (part, whole))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if torch.is_tensor(theirs[key]))
    part.save_pretrained(tmp_path / "again")  # with the settings of the video processor
    assert type(loading.load_processor(tmp_path / "again").video_processor) is type(whole.video_processor)
