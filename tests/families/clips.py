"""Clips for the families that take them: the zoo's own members, with video processors of the tiny models' size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from tiny_models import picture, square
from zoo import Built, build, load_members

__all__ = ["CLIPS", "FRAMES", "TakesClips", "built", "clip_inputs", "frames"]

FRAMES = 4
_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 60 * 90}
_TOGETHER = {"shortest_edge": 4 * 64 * 64, "longest_edge": 40_000}


@dataclass(frozen=True)
class TakesClips:
    """How one family is shown a clip.

    Attributes:
        slot: what stands for a clip in a prompt.
        videos: makes its video processor, of the size that the tiny model is made for; ``None``: the member's own is.
        together: frames that one image token stands for.
        long: checked where time does not count (``campaign``).
        refused: why it is refused, by method; ``encoder``: what tokens of its encoder know.
        seen_by_gradcam: frames that a token of Grad-CAM's layer stands for, where not as many as an image token.
    """

    slot: str
    videos: Callable[[], Any] | None
    together: int = 1
    long: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    seen_by_gradcam: int | None = None


def _cropped(name: str) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(size={"shortest_edge": 56}, crop_size=square())


_MERGES = {"gradcam": "their places are not known"}  # the encoder, tokens on the way
_NO_ENCODER = "has no vision encoder of its own"
_NO_AUTOGRAD = "which computes without autograd"
_QWEN = "<|vision_start|><|video_pad|><|vision_end|>"
_GLM = "<|begin_of_video|><|video|><|end_of_video|>"


def _sized(name: str, pixels: Mapping[str, int] = _TOGETHER) -> Callable[[], Any]:
    """A video processor whose size counts pixels, by default of all frames together."""
    return lambda: getattr(transformers, name)(size=dict(pixels))


CLIPS: dict[str, TakesClips] = {
    "qwen2_vl": TakesClips(_QWEN, _sized("Qwen2VLVideoProcessor", _PIXELS), 2),
    "qwen2_5_vl": TakesClips(_QWEN, _sized("Qwen2VLVideoProcessor", _PIXELS), 2),
    "qwen3_vl": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2),
    "qwen3_5": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2),
    "qwen2_5_omni_thinker": TakesClips(_QWEN, _sized("Qwen2VLVideoProcessor", _PIXELS), 2),
    "glm4v": TakesClips(_GLM, _sized("Glm4vVideoProcessor"), 2),
    "glm46v": TakesClips(_GLM, _sized("Glm46VVideoProcessor"), 2),
    "perception_lm": TakesClips("<|video|>", lambda: transformers.PerceptionLMVideoProcessor(size=square())),
    "minicpmv4_6": TakesClips("<|video|>", lambda: transformers.MiniCPMV4_6VideoProcessor(), refused=_MERGES),
    "llava_onevision": TakesClips("<video>", lambda: transformers.LlavaOnevisionVideoProcessor(size=square())),
    "llava_next_video": TakesClips("<video>", _cropped("LlavaNextVideoVideoProcessor")),
    "video_llava": TakesClips("<video>", _cropped("VideoLlavaVideoProcessor")),
    "internvl": TakesClips("<video>", lambda: transformers.InternVLVideoProcessor(size=square())),
    "smolvlm": TakesClips(
        "<video>",
        lambda: transformers.SmolVLMVideoProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_sample_frames=False
        ),
    ),
    # The long checks alone.
    "qwen3_vl_moe": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2, long=True),
    "qwen3_5_moe": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2, long=True),
    "qwen3_omni_moe_thinker": TakesClips(
        _QWEN, lambda: transformers.Qwen2VLVideoProcessor(size=dict(_PIXELS), patch_size=16), 2, long=True
    ),
    "cosmos3_omni": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2, long=True),
    "dots3_note": TakesClips(
        "<|img|><|video_pad|><|endofimg|>", None, long=True, refused={"tmm": _NO_AUTOGRAD, "gradcam": _NO_AUTOGRAD}
    ),
    "ernie4_5_vl_moe": TakesClips(  # pairs frames behind Grad-CAM's layer
        "<|IMAGE_START|><|VIDEO_PLACEHOLDER|><|IMAGE_END|>", None, 2, long=True, seen_by_gradcam=1
    ),
    "exaone4_5": TakesClips(_QWEN, _sized("Qwen2VLVideoProcessor", _PIXELS), 2, long=True),
    "hyperclovax_vision_v2": TakesClips(_QWEN, _sized("Qwen2VLVideoProcessor", _PIXELS), 2, long=True),
    "lfm3_vl": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2, long=True),
    "qwen4_exp": TakesClips(_QWEN, _sized("Qwen3VLVideoProcessor"), 2, long=True),
    "cohere_compass": TakesClips(
        "<|VISION_START|><|VIDEO_PAD|><|VISION_END|>", _sized("CohereCompassVideoProcessor"), 2, long=True
    ),
    "minicpmv4_7": TakesClips("<|video|>", None, long=True, refused=_MERGES),
    "minicpm_ocr": TakesClips("<|video|>", None, long=True),
    "glm4v_moe": TakesClips(_GLM, _sized("Glm4vVideoProcessor"), 2, long=True),
    "glm_ocr": TakesClips(_GLM, _sized("Glm46VVideoProcessor"), 2, long=True),
    "glm5_next": TakesClips(_GLM, _sized("Glm5NextVideoProcessor"), 2, long=True),
    "muse_glimmer": TakesClips("<|video|>", None, 2, long=True),
    "gemma4": TakesClips("<|video|>", lambda: transformers.Gemma4VideoProcessor(patch_size=4), long=True),
    "gemma4_unified": TakesClips(
        "<|video|>",
        lambda: transformers.Gemma4UnifiedVideoProcessor(patch_size=4),
        long=True,
        refused={"gradcam": _NO_ENCODER, "encoder": _NO_ENCODER},
    ),
    "video_llama_3": TakesClips(
        _QWEN,
        lambda: transformers.VideoLlama3VideoProcessor(size=dict(_TOGETHER), use_token_compression=False),
        long=True,
    ),
}


def built(name: str) -> Built:
    """A member whose video processor makes frames of the tiny model's size, and whose chat template knows videos."""
    load_members()
    made = build(name)
    if CLIPS[name].videos is not None:
        made.processor.video_processor = CLIPS[name].videos()
    text = "{% elif part['type'] == 'text' %}"
    video = "{% elif part['type'] == 'video' %}" + CLIPS[name].slot
    made.processor.chat_template = made.processor.chat_template.replace(text, video + text)
    return made


def frames(count: int = FRAMES, *, seed: int = 0, width: int = 90, height: int = 60) -> np.ndarray:
    """A clip of smooth random frames, ``(frame, row, col, channel)`` uint8."""
    return np.stack([np.asarray(picture(width, height, seed=seed + number)) for number in range(count)])


def clip_inputs(
    made: Built, clips: Sequence[np.ndarray], images: Sequence[Any] = (), text: str = "", **call: Any
) -> dict[str, Any]:
    """Model inputs for one prompt of images and then clips, by the family's own processor."""
    text = text or made.member.slot * len(images) + CLIPS[made.member.name].slot * len(clips) + " What happens?"
    metadata = [
        {"total_num_frames": len(clip), "fps": 2.0, "duration": len(clip) / 2, "frames_indices": list(range(len(clip)))}
        for clip in clips
    ]
    found = made.processor(
        videos=list(clips),
        text=[text],
        return_tensors="pt",
        videos_kwargs={"do_sample_frames": False, "video_metadata": metadata, "return_metadata": True, **call},
        **({"images": list(images)} if images else {}),
    )
    return {name: value for name, value in found.items() if torch.is_tensor(value)}
