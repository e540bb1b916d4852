"""Seconds, peak memory and use of the chip of every step, on models of 7 billion weights; beside the paper's Table 9.

    python tests/benchmarks/bench_gpu.py                   # on a CUDA device of 80 GB or more; goes on where it stopped
    python tests/benchmarks/bench_gpu.py --small           # tiny models of the same kinds, on the CPU: everything runs

LLaVA-1.5-7B, LLaVA-OneVision-7B and Qwen2.5-VL-7B with their true geometry and random weights in bfloat16, made on the
device: cost depends on shapes, not on what was learned. A picture of 640 × 480 pixels, an answer of 64 tokens, all of
which are explained. Per step: seconds (of the second of two runs; the first warms up), peak gigabytes of tensors with
the weights, and the share of the chip's peak: operations of matrix products and attention, counted by the rules of
``torch.utils.flop_counter``, per second of the run, relative to the vendor's figure for dense bfloat16. Operations of
long runs are counted on one iteration and multiplied by the number of passes.

Models and steps come in the order of their value. A call begins no new step after ``--seconds`` (540); the next one
does what is missing. Each figure is written when it is made; what fails is written with its error, and ends nothing.
Writes ``results/gpu.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from random_model import write_results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

import lvlm_probe as probe

QUESTION = "What is in the picture? Describe the colour and shape of the two on the left."
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bfloat16 operations per second, from the vendor's data sheets; the first name that the device's contains."""
PAPER = {
    "igos++ (paper)": ("iGOS++", 31, 7.0),
    "gradcam": ("Grad-CAM", 20, 1.0),
    "tmm": ("T-MM", 36, 2.7),
    "iia": ("IIA", 22, 4.7),
}
"""Table 9: its name there, GB at most, seconds per sample; the paper names neither the model nor the chip."""


@dataclass(frozen=True)
class Explanation:
    """A method at its settings, and the same with one iteration, for counting."""

    method: str
    params: dict[str, Any] = field(default_factory=dict)
    counted: dict[str, Any] = field(default_factory=dict)


EXPLANATIONS: dict[str, Explanation] = {
    "gradcam": Explanation("gradcam"),
    "tmm": Explanation("tmm"),
    "iia": Explanation("iia"),
    "igos++ (fast)": Explanation("igos++", {"preset": "fast"}),
    # Eq. 8: 10 points of the deletion's and 10 of the insertion's integrated gradient, 5 times: 100 passes.
    "igos++ (paper)": Explanation("igos++", {"preset": "paper"}, {"iterations": 1}),
    "igos++ (thorough)": Explanation("igos++", {"preset": "thorough"}, {"iterations": 1, "refine": 1}),
}
RECORDINGS: dict[str, dict[str, Any] | None] = {
    "generate": None,
    "record": {"llr": False, "attention": False},
    "record with attention": {"llr": False, "attention": True},
    "record with attention and LLR": {"llr": True, "attention": True},
}
CURVES = "deletion and insertion"

# ---------------------------------------------------------------------------------------------------------- the models


def llava(small: bool) -> tuple[Any, Any]:
    """llava-hf/llava-1.5-7b-hf: CLIP ViT-L/14 at 336 pixels, Llama of 32 layers of 4096."""
    edge, tower = 336, {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "projection_dim": 768,
    }  # fmt: skip
    decoder = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    if small:
        edge, tower, decoder = 56, {**tower, **tiny_models.LAYERS}, {**decoder, **_SMALL_DECODER}
    family, tokenizer, ids = _family("llava")
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": edge, "patch_size": 14},
        text_config={"model_type": "llama", **tiny_models.text_config(ids), **decoder},
        image_token_index=ids["<image>"], vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        tiny_models.pil_image_processor(
            "CLIPImageProcessorPil", size={"shortest_edge": edge}, crop_size=tiny_models.square(edge)
        ),
        tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.chat_template = tiny_models.make_chat_template(family.slot)
    return transformers.LlavaForConditionalGeneration, (config, processor)


def onevision(small: bool) -> tuple[Any, Any]:
    """llava-hf/llava-onevision-qwen2-7b-ov-hf: SigLIP-so400m/14 at 384 with tiles, Qwen2 of 28 layers of 3584."""
    edge, most, tower = 384, 6, {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    }  # fmt: skip
    decoder = {**_QWEN, "vocab_size": 152128, "max_position_embeddings": 32768}
    if small:
        edge, most = 56, 2
        tower, decoder = {**tower, **tiny_models.LAYERS}, {**decoder, **_SMALL_DECODER}
    pinpoints = [[edge * rows, edge * columns] for rows in range(1, most + 1) for columns in range(1, most + 1)]
    family, tokenizer, ids = _family("llava_onevision")
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", **tower, "image_size": edge, "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **tiny_models.text_config(ids), **decoder},
        image_token_index=ids["<image>"], video_token_index=ids["<video>"], image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    processor = tiny_models.video_family(
        "LlavaOnevisionProcessor", "LlavaOnevisionVideoProcessor",
        tiny_models.pil_image_processor(
            "LlavaOnevisionImageProcessorPil", size=tiny_models.square(edge), image_grid_pinpoints=pinpoints
        ),
        tokenizer, num_image_tokens=(edge // 14) ** 2, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    processor.chat_template = tiny_models.make_chat_template(family.slot)
    return transformers.LlavaOnevisionForConditionalGeneration, (config, processor)


def qwen(small: bool) -> tuple[Any, Any]:
    """Qwen/Qwen2.5-VL-7B-Instruct: a tower of 32 layers of 1280 with windows, Qwen2 of 28 layers of 3584."""
    tower: dict[str, Any] = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    decoder: dict[str, Any] = {**_QWEN, "vocab_size": 152064, "max_position_embeddings": 128000}
    sections = [16, 24, 24]
    if small:
        decoder = {**decoder, **_SMALL_DECODER}
        tower |= {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": decoder["hidden_size"], "fullatt_block_indexes": [1],
        }  # fmt: skip
        sections = [2, 3, 3]
    ids = _family("qwen2_5_vl")[2]
    decoder["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**tower, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**tiny_models.text_config(ids), **decoder},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    processor = tiny_models.build_processor("qwen2_5_vl")
    if not small:
        processor.image_processor = tiny_models.pil_image_processor(
            "Qwen2VLImageProcessorPil", size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}, patch_size=14
        )
    return transformers.Qwen2_5_VLForConditionalGeneration, (config, processor)


def _family(name: str) -> tuple[Any, Any, dict[str, int]]:
    family = tiny_models.FAMILIES[name]
    tokenizer = tiny_models.make_tokenizer(family)
    return family, tokenizer, tokenizer.get_vocab()


_QWEN: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip
_SMALL_DECODER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 700,
}  # fmt: skip
MODELS: dict[str, tuple[str, Callable[[bool], tuple[Any, Any]]]] = {
    "LLaVA-1.5-7B": ("llava", llava),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", qwen),
    "LLaVA-OneVision-7B": ("llava_onevision", onevision),
}


def build(name: str, small: bool, device: torch.device) -> tuple[Any, Any]:
    """The model in bfloat16, its weights drawn on the device, and its processor."""
    model_class, (config, processor) = MODELS[name][1](small)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False).eval(), processor


# ------------------------------------------------------------------------------------------------------------ measuring


class Chip:
    """The device: waits for it, its memory, its peak."""

    def __init__(self, device: torch.device, peak: float | None) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if self.cuda else "CPU"
        self.peak = peak or next((value for key, value in PEAKS.items() if self.cuda and key in self.name), None)

    def measured(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Seconds, and peak gigabytes with everything that is on the device; ``None`` where that is not counted."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else None
        return {"seconds": seconds, "peak_gb": peak}

    def with_share(self, line: dict[str, Any], operations: float) -> dict[str, Any]:
        share = operations / line["seconds"] / self.peak if self.peak else None
        return {**line, "tera_operations": operations / 1e12, "share_of_peak": share}


class Operations(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention by torch's own rules.

    ``FlopCounterMode`` itself hangs hooks on leaves of the graph, which ``torch.autograd.grad`` does not allow.
    """

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        rule = flop_registry.get(function.overloadpacket)
        if rule is not None:
            self.total += rule(*args, **kwargs, out_val=result)
        return result


def operations_of(run: Callable[[], Any]) -> float:
    """Floating-point operations of ``run()``: a multiplication and an addition are two."""
    with Operations() as counter:
        run()
    return float(counter.total)


class Sample:
    """One model, one picture, one answer."""

    def __init__(self, name: str, chip: Chip, small: bool, directory: Path) -> None:
        self.chip, self.directory, self.small = chip, directory, small
        self.family = MODELS[name][0]
        self.model, self.processor = build(name, small, chip.device)
        self.tokens = 6 if small else 64
        self.picture = tiny_models.picture(90, 60) if small else tiny_models.picture(640, 480)
        self._replay: probe.Replay | None = None
        self._heat: probe.Heatmap | None = None

    def inputs(self) -> Any:
        given = tiny_models.inputs(self.family, self.model, self.processor, [self.picture], QUESTION)
        return given.to(self.model.device, self.model.dtype)

    def recorded(self, settings: dict[str, Any] | None, *, rounds: int = 2) -> dict[str, Any]:
        lengths = {"min_new_tokens": self.tokens, "max_new_tokens": self.tokens, "do_sample": False}
        if settings is None:
            given = self.inputs()
            run = lambda: self.model.generate(**given, **lengths)  # noqa: E731
            lines = [self.chip.measured(run) for _ in range(rounds)]
            return self.chip.with_share(lines[-1], operations_of(run))
        with probe.attach(self.model, self.processor) as attached:
            given = self.inputs()
            with attached.record(self.directory, **settings):
                return [self.chip.measured(lambda: self.model.generate(**given, **lengths)) for _ in range(rounds)][-1]

    @property
    def replay(self) -> probe.Replay:
        if self._replay is None:
            with probe.attach(self.model, self.processor) as attached:
                given = self.inputs()
                with attached.record(self.directory / "answer", llr=False) as recording:
                    self.model.generate(
                        **given, min_new_tokens=self.tokens, max_new_tokens=self.tokens, do_sample=False
                    )
            self._replay = probe.replay(recording.traces[-1], self.model, self.processor)
        return self._replay

    @property
    def image_tokens(self) -> int:
        return int(self.replay.trace.header.image_tokens)

    def explained(self, explanation: Explanation) -> dict[str, Any]:
        selection = probe.select_tokens(self.replay, span=(0, self.tokens))

        def run(params: dict[str, Any]) -> probe.Heatmap:
            return probe.explain(
                self.replay, method=explanation.method, tokens=selection, strengthen=False, **params
            )  # fmt: skip

        short: list[probe.Heatmap] = []
        params = explanation.params
        operations = operations_of(lambda: short.append(run({**params, **explanation.counted})))  # and warms up
        whole: list[probe.Heatmap] = []
        line = self.chip.measured(lambda: whole.append(run(params)))
        self._heat = whole[-1]
        counted, passes = (heat.provenance["passes"] for heat in (short[-1], whole[-1]))
        factor = sum(passes.values()) / max(1, sum(counted.values()))
        line["passes"] = [passes["forward"], passes["backward"]]
        return self.chip.with_share(line, operations * factor)

    def curves(self) -> dict[str, Any]:
        if self._heat is None or self._heat.values is None:
            self.explained(EXPLANATIONS["gradcam"])
        heat = self._heat
        assert heat is not None
        steps = {"steps": 4} if self.small else {}
        operations = operations_of(lambda: probe.evaluate(heat, self.replay, **steps))
        return self.chip.with_share(
            self.chip.measured(lambda: probe.evaluate(heat, self.replay, **steps)), operations
        )  # fmt: skip


def steps_of(sample: Sample) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, in the order in which it matters."""
    steps: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, settings in RECORDINGS.items():
        steps[name] = lambda settings=settings: sample.recorded(settings)
    for name, explanation in EXPLANATIONS.items():
        steps[name] = lambda explanation=explanation: sample.explained(explanation)
    steps[CURVES] = sample.curves
    return steps


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU: figures mean nothing")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing new after this long")
    parser.add_argument("--again", action="store_true", help="measure anew what has been measured")
    parser.add_argument("--peak-tflops", type=float, help="the chip's peak in dense bfloat16, where it is not known")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json, or results/gpu-small.json with --small")
    options = parser.parse_args(arguments)
    out = options.out or Path(__file__).parent / "results" / ("gpu-small.json" if options.small else "gpu.json")
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --small runs everything on the CPU with tiny models")
    started = time.perf_counter()
    warnings.filterwarnings("ignore", category=probe.ProbeWarning)
    chip = Chip(torch.device("cpu" if options.small else "cuda:0"), options.peak_tflops and options.peak_tflops * 1e12)
    results: dict[str, Any] = {}
    if out.exists():
        known = json.loads(out.read_text(encoding="utf-8"))
        if known.get("device") == chip.name:  # figures of different chips do not go into one table
            results = known["models"]

    def write() -> None:
        write_results(out, {
            "command": "python tests/benchmarks/bench_gpu.py" + (" --small" if options.small else ""),
            "small": options.small, "device": chip.name, "peak_operations_per_second": chip.peak,
            "paper": {step: {"name": row[0], "gb": row[1], "seconds": row[2]} for step, row in PAPER.items()},
            "models": results,
        })  # fmt: skip

    left = 0
    for model in options.models:
        result = results.setdefault(model, {})
        lines = result.setdefault("steps", {})
        # Failed steps are tried again.
        wanted = [
            step for step in (*RECORDINGS, *EXPLANATIONS, CURVES)
            if options.again or "seconds" not in lines.get(step, {})
        ]  # fmt: skip
        for step, line in measured(model, wanted, chip, options.small, started + options.seconds):
            if step:
                lines[step] = line
                show(model, step, line)
            else:
                result.update(line)
            write()
        left += sum("seconds" not in lines.get(step, {}) for step in wanted)
    print(f"written to {out}" + (f"; {left} step(s) left: call again" if left else ""))


def measured(name: str, wanted: list[str], chip: Chip, small: bool, end: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure steps of a model, none of which is begun after ``end``: each with its figures or its error, and once the
    model's own figures with no step."""
    if not wanted or time.perf_counter() > end:
        return
    with tempfile.TemporaryDirectory() as directory:
        sample: Sample | None = None
        for step in wanted:
            if time.perf_counter() > end:
                break
            try:
                if sample is None:
                    sample = Sample(name, chip, small, Path(directory))
                    weights = sum(weight.numel() for weight in sample.model.parameters())
                    yield "", {"weights": weights, "answer_tokens": sample.tokens}
                line = steps_of(sample)[step]()
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # which hold what was on the device
                line = {"error": f"{type(error).__name__}: {error}"[:400]}
            yield step, line
            if sample is None:
                break  # nor would it be made for the next step
            with contextlib.suppress(Exception):
                yield "", {"image_tokens": sample.image_tokens}
            if chip.cuda:
                gc.collect()
                torch.cuda.empty_cache()


def show(model: str, step: str, line: dict[str, Any]) -> None:
    """One line for a person."""
    if "error" in line:
        print(f"{model:20s} {step:32s} {line['error']}", flush=True)
        return
    memory = "" if line["peak_gb"] is None else f"{line['peak_gb']:7.1f} GB"
    share = line.get("share_of_peak")
    print(
        f"{model:20s} {step:32s} {line['seconds']:8.2f} s {memory} "
        f"{'' if share is None else f'{share:6.1%} of peak'}",
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
