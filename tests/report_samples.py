"""Heatmaps and scores of a recording that never was: made up, without a model, for the tests of the report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lvlm_probe.heatmap import Heatmap
from lvlm_probe.metrics import Score, Verdict
from lvlm_probe.selection import TokenSelection
from lvlm_probe.words import group_words

PIECES = ["The", " car", "ousel", " in", " the", " park", " is", " bright", " red", ".", "</s>"]
LLR = [0.05, 0.9, 0.4, 0.02, -0.3, 0.6, 0.0, 0.7, 3.4, 0.01, 0.0]
LOG_P = [-0.02, -0.1, -0.05, -0.01, -0.02, -0.2, -0.01, -0.4, -0.03, -0.01, -0.0]
SPOT = (0.62, 0.38)  # where the fake picture's object is, as fractions


def picture(size: tuple[int, int] = (900, 620), seed: int = 0) -> Image.Image:
    """A scene with soft light, noise (so that JPEG has something to do) and one red disc."""
    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(size)
    sky = np.stack([0.55 + 0.3 * x, 0.66 + 0.2 * y, 0.8 - 0.5 * y], axis=-1)
    coarse = Image.fromarray((rng.random((5, 7)) * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    texture = np.asarray(coarse)[..., None] / 255 * 0.22 + rng.normal(0, 0.012, (height, width, 1))
    image = Image.fromarray((np.clip(sky - 0.12 + texture, 0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    cx, cy, radius = SPOT[0] * width, SPOT[1] * height, 0.13 * min(size)
    draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=(196, 38, 44))
    draw.rectangle((0.1 * width, 0.62 * height, 0.27 * width, 0.85 * height), fill=(52, 92, 148))
    draw.polygon(
        [(0.3 * width, 0.3 * height), (0.4 * width, 0.12 * height), (0.46 * width, 0.34 * height)], fill=(226, 182, 60)
    )
    return image


def trace(trace_id: str = "20261123T051141-7-a", **changes: Any) -> SimpleNamespace:
    """A recorded answer; `changes` replace attributes."""
    tokens = list(changes.pop("tokens", PIECES))
    llr = np.array(changes.pop("llr", LLR), dtype=np.float32)
    log_probs = np.array(changes.pop("log_probs", LOG_P), dtype=np.float32)
    special = np.array([piece.startswith("</") for piece in tokens])
    facts: dict[str, Any] = {
        "trace_id": trace_id,
        "path": Path("/home/ada/secret/runs/20261123T051141.b1.h5"),
        "row": 0,
        "status": "complete",
        "error": None,
        "created": "2026-11-23T05:11:41Z",
        "prompt": "USER: <image> What colour is the carousel? ASSISTANT:",
        "question": "What colour is the carousel?",
        "tokens": tokens,
        "special": special,
        "log_probs": log_probs,
        "baseline_log_probs": log_probs - llr,
        "llr": llr,
        "words": group_words(tokens, special.tolist()),
        "images": [picture()],
        "model": {
            "model_id": "/home/ada/models/llava-7b",
            "revision": None,
            "class": "LlavaForConditionalGeneration",
            "adapter": "generic",
            "attn_implementation": "sdpa",
            "torch_dtype": "float32",
            "fingerprint": "9f3a" * 16,
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "lvlm_probe": "0.1.0"},
        },
        "notes": [],
        "meta": {},
    }
    facts.update(changes)
    return SimpleNamespace(**facts)


def selection(indices: tuple[int, ...] = (8,), *, rule: str = "llr", **changes: Any) -> TokenSelection:
    """A selection over `PIECES`."""
    params = {"alpha": 1.0} if rule == "llr" else {"span": [indices[0], indices[-1] + 1]}
    facts: dict[str, Any] = {
        "indices": indices,
        "tokens": tuple(PIECES),
        "llr": tuple(LLR),
        "rule": rule,
        "params": params,
        "skipped": {10: "special token '</s>'"},
        "reason": None if indices else "no token gains more than 1 nats from the image",
    }
    facts.update(changes)
    return TokenSelection(**facts)


def blob(centre: tuple[float, float] = SPOT, width: float = 0.1, cells: tuple[int, int] = (24, 32)) -> np.ndarray:
    """A smooth map, ``(row, col)`` in [0, 1], with its peak at `centre` (fractions, x first)."""
    rows, cols = cells
    y, x = (np.arange(rows)[:, None] + 0.5) / rows, (np.arange(cols)[None] + 0.5) / cols
    values = (
        np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))
        + 0.06 * np.sin(9 * x) * np.cos(7 * y)
        + 0.06
    )
    return np.clip(values / values.max(), 0, 1).astype(np.float32)


def heat(recording: Any = None, chosen: TokenSelection | None = None, **changes: Any) -> Heatmap:
    """An explanation of `recording` (a `trace`)."""
    recording = trace() if recording is None else recording
    chosen = selection() if chosen is None else chosen
    facts: dict[str, Any] = {
        "values": blob() if chosen else None,
        "reason": f"nothing to explain: {chosen.reason}" if chosen.reason else None,
        "image_size": recording.images[0].size,
        "selection": chosen,
        "method": "igos++",
        "params": {"iterations": 20, "mask_size": 32, "note": "from /home/ada/settings/igos.yaml"},
        "provenance": {
            "trace_id": recording.trace_id,
            "seed": 0,
            "versions": {"lvlm_probe": "0.1.0", "torch": "2.13.0"},
            "baseline": baseline("blur", strength=0.1, mean_probability=0.033),
            "passes": {"forward": 1210, "backward": 380},
            "seconds": 8.71,
        },
        "trace": recording,
    }
    facts.update(changes)
    return Heatmap(**facts)


def baseline(kind: str, **facts: Any) -> dict[str, Any]:
    """A baseline's description, as provenance holds it."""
    return {"kind": kind, **facts}


def score(*, deletion: float = 0.04, insertion: float = 0.96, reasons: tuple[str, ...] = (), **changes: Any) -> Score:
    """A score whose curves have about the areas asked for."""
    fractions = np.linspace(0, 1, 33)
    falling = np.exp(-fractions / max(deletion, 1e-3))
    rising = 1 - np.exp(-fractions / max(1 - insertion, 1e-3))
    facts: dict[str, Any] = {
        "deletion": deletion,
        "insertion": insertion,
        "fractions": tuple(fractions),
        "deletion_curve": tuple(falling),
        "insertion_curve": tuple(rising),
        "deletion_raw": tuple(0.033 + (0.97 - 0.033) * falling),
        "insertion_raw": tuple(0.033 + (0.97 - 0.033) * rising),
        "tie_share": 0.02,
        "original": 0.97,
        "baseline": 0.033,
        "baseline_check": {
            "kind": "blur",
            "mean_probability": 0.033,
            "original_probability": 0.97,
            "limit": 0.05,
            "passed": True,
        },
        "verdict": Verdict(trusted=not reasons, reasons=reasons),
        "params": {"score": "prob", "auc": "trapezoid", "seed": 0},
    }
    facts.update(changes)
    return Score(**facts)


def page(*, words: bool = True, **changes: Any) -> tuple[list[Heatmap], list[Score]]:
    """Heatmaps and scores for a page with one sample: the whole answer, ``carousel`` and ``park``."""
    recording = trace(**changes)
    heats = [heat(recording)]
    scores = [score()]
    if words:
        heats.append(heat(recording, selection((1, 2), rule="span"), values=blob((0.18, 0.74), 0.07)))
        heats.append(heat(recording, selection((5,), rule="span"), values=blob((0.37, 0.25), 0.08)))
        doubt = ("insertion − deletion is -0.18, not clearly above the 0 of a random heatmap (threshold 0.2)",)
        scores += [score(deletion=0.2, insertion=0.7), score(deletion=0.62, insertion=0.44, reasons=doubt)]
    return heats, scores
