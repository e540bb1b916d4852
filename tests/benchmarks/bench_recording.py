"""What recording costs: generate() with and without a probe, in one run, call by call in turn.

    python tests/benchmarks/bench_recording.py

A random LLaVA large enough to measure (by default some 190 million weights, 576 image tokens) answers the same
question again and again, plainly and under each kind of recording, in an order drawn anew for every round. A
recording's overhead is the median over rounds of its time relative to the plain call of the same round, everything
included: hooks, attention rows, the file on disk. The baseline pass behind the log-likelihood ratios (`llr=True`) is
a pass of its own, which `llr=False` leaves for later, so it is shown apart.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

import lvlm_probe as probe

KINDS: dict[str, dict[str, Any]] = {
    "without attention": {"llr": False, "attention": False},
    "with attention": {"llr": False, "attention": True},
    "with attention and LLR": {"llr": True, "attention": True},
}


def build(hidden: int, layers: int) -> tuple[Any, Any]:
    """An untrained LLaVA of ordinary shape: CLIP at 336 pixels, 576 image tokens, a Llama decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = tiny_models.build_processor("llava")
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=32000, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, processor


def measure(model: Any, processor: Any, *, rounds: int, tokens: int, directory: Path) -> dict[str, Any]:
    """Seconds per call for every kind, in rounds; and bytes per answer token of the files."""
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    inputs = tiny_models.inputs("llava", model, processor, [picture], "What is in this picture?")

    def plain() -> float:
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - start

    def recorded(kind: str) -> float:
        with probe.attach(model, processor) as p:
            again = tiny_models.inputs("llava", model, processor, [picture], "What is in this picture?")
            with p.record(directory / kind.replace(" ", "-"), **KINDS[kind]):
                p._attachment.describe_model()  # the fingerprint, once per recording and not once per call
                start = time.perf_counter()
                model.generate(**again, max_new_tokens=tokens, do_sample=False)
                return time.perf_counter() - start

    plain()
    for kind in KINDS:
        recorded(kind)
    shuffled = random.Random(0)
    seconds: dict[str, list[float]] = {"plain": [], **{kind: [] for kind in KINDS}}
    for number in range(rounds):
        for kind in shuffled.sample(list(seconds), len(seconds)):
            seconds[kind].append(plain() if kind == "plain" else recorded(kind))
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    size = {}
    for kind in KINDS:
        traces = list(probe.open_store(directory / kind.replace(" ", "-")))
        size[kind] = {
            "file_bytes": statistics.median(trace.path.stat().st_size for trace in traces),
            "attention_bytes_per_token": 0 if traces[-1].attention is None else _attention_bytes(traces[-1]) / tokens,
        }
    return {"seconds": seconds, "size": size}


def _attention_bytes(trace: probe.Trace) -> int:
    attention = trace.attention
    assert attention is not None
    return attention.values.size * 2 + attention.text_mass.size * 2  # both are stored in half precision


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    model, processor = build(options.hidden, options.layers)
    directory = Path(tempfile.mkdtemp())
    try:
        found = measure(model, processor, rounds=options.rounds, tokens=options.tokens, directory=directory)
    finally:
        shutil.rmtree(directory)
    base = found["seconds"]["plain"]
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{weights / 1e6:.0f} M weights, {options.tokens} tokens, {options.rounds} rounds, {options.threads} threads")
    print(f"plain generate(): {statistics.median(base):.2f} s")
    for kind in KINDS:
        ratios = sorted(mine / plain for mine, plain in zip(found["seconds"][kind], base, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        size = found["size"][kind]
        middle, low, high = (100 * (value - 1) for value in (statistics.median(ratios), quartiles[0], quartiles[2]))
        print(
            f"{kind:24s} {middle:+5.1f} %  (quartiles {low:+.1f} to {high:+.1f})  "
            f"file {size['file_bytes'] / 1024:.0f} KiB, "
            f"attention {size['attention_bytes_per_token'] / 1024:.1f} KiB per token"
        )
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "weights": weights, **found}))


if __name__ == "__main__":
    main()
