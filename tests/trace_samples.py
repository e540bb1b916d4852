"""Captures for tests: deterministic, small, with everything a trace can hold."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from lvlm_probe.trace.clips import Clip
from lvlm_probe.trace.records import Capture, ImageRecord, PointRecord, RowCapture

ANSWER = ["The", " small", " square", " is", " red", " and", " well", "-", "lit", "."]


def sample_image(width: int = 24, height: int = 18, *, seed: int = 0) -> Image.Image:
    """A small picture whose pixels depend on ``seed``."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 9 + seed * 17, y * 13, (x + y) * 5], -1).astype(np.uint8), "RGB")


def sample_image_record(width: int = 24, height: int = 18, *, seed: int = 0) -> ImageRecord:
    """The same picture as a PNG file."""
    buffer = io.BytesIO()
    sample_image(width, height, seed=seed).save(buffer, "PNG")
    return ImageRecord(buffer.getvalue(), "image/png", width, height)


def sample_row(
    index: int = 0,
    *,
    tokens: int = 8,
    image_tokens: int = 6,
    layers: int = 2,
    heads: int = 1,
    images: int = 1,
    attention: bool = True,
    llr: bool = True,
    clips: bool = False,
    seed: int = 0,
) -> RowCapture:
    """One row; the same arguments give the same row."""
    rng = np.random.default_rng((seed, index))
    prompt = image_tokens + 5
    pieces = [ANSWER[step % len(ANSWER)] for step in range(max(0, tokens - 1))] + ["</s>"] * (tokens > 0)
    log_probs = -rng.random(tokens, np.float32)
    drop = np.array([4.0 if piece in (" square", " red") else 0.1 for piece in pieces], np.float32)
    points: dict[str, PointRecord] = {}
    if attention:
        axes = ("step", "layer", "head", "image_token")
        which = tuple(range(layers))
        rows = rng.random((tokens, layers, heads, image_tokens)).astype(np.float16) / np.float16(image_tokens)
        mass = (1 - rows.astype(np.float32).sum(-1)).astype(np.float16)
        module, reduce = "model.language_model.layers.{layer}.self_attn", "head_mean" if heads == 1 else "none"
        points["decoder.attention"] = PointRecord(rows, axes, which, reduce, module)
        points["decoder.attention_text_mass"] = PointRecord(
            mass, axes[:3], which, reduce, module, {"keys": "not image"}
        )
    return RowCapture(
        trace_id=f"sample-{seed}-r{index}",
        batch_row=index,
        status="complete",
        error=None,
        input_ids=np.arange(prompt, dtype=np.int64) + 3,
        prompt="USER: " + "<image>" * image_tokens + "\nWhat is there? ASSISTANT:",
        question="What is there?",
        model_kwargs={
            "pixel_values": rng.standard_normal((images, 3, 8, 8)).astype(np.float32),
            "image_sizes": np.array([[18, 24]] * images, np.int64),
            "attention_mask": np.ones((1, prompt), bool),
        },
        images=[sample_image_record(seed=seed + number) for number in range(images)],
        processor_call={"class": "CLIPImageProcessor", "kwargs": {}, "structure": "flat", "backend": "pil"},
        clips=(Clip(0, images, tuple(range(0, 2 * images, 2)), 4.0, 2 * images, images / 2),) if clips else (),
        image_token_id=7,
        image_positions=np.arange(image_tokens, dtype=np.int64) + 2,
        image_index=np.sort(np.arange(image_tokens, dtype=np.int64) % max(1, images)),
        patch_box=rng.random((image_tokens, 4), np.float32) * 18,
        patch_frames=np.tile([[0, images - 1]], (image_tokens, 1)) if clips else None,
        token_ids=rng.integers(0, 32_000, tokens),
        tokens=pieces,
        special=np.array([piece == "</s>" for piece in pieces], bool),
        log_probs=log_probs,
        log_probs_source="generation",
        top_log_probs=log_probs / 2,
        top_tokens=[piece.upper() for piece in pieces],
        baseline_log_probs=log_probs - drop if llr else None,
        baseline={"kind": "blur", "params": {"sigma": 12.0}, "mean_probability": 0.03} if llr else None,
        points=points,
        notes=[] if attention else ["No attention was recorded: the model has none."],
        meta={"run": seed},
    )


def sample_capture(rows: int = 1, *, seed: int = 0, **row: object) -> Capture:
    """A capture of ``rows`` rows; further arguments go to ``sample_row``."""
    return Capture(
        rows=[sample_row(index, seed=seed, **row) for index in range(rows)],  # type: ignore[arg-type]
        model={
            "model_id": "demo/tiny-llava",
            "revision": None,
            "class": "LlavaForConditionalGeneration",
            "adapter": None,
            "attn_implementation": "sdpa",
            "torch_dtype": "float32",
            "fingerprint": "0" * 64,
            "config": {"hidden_size": 64, "text_config": {"layers": 2}},
            "generation_config": {"do_sample": False, "max_new_tokens": 32},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
        created="2026-11-23T05:11:41.123456+00:00",
        seconds={"generate": 0.51, "baseline": 0.12},
    )
