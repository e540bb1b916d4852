"""The embedded model with quantised weights, by every library whose weights compute on a CPU.

``make test`` installs the libraries beside its environment, in ``.venv-quantised``, for these tests alone: transformers
imports all of them with every model, which takes seconds. Not here: quanto's int4, which compiles its kernel with the
machine's C++ compiler when it is first used (a minute or more), and GPTQ and AWQ, whose kernels need a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lvlm_probe as probe

__all__ = ["KINDS", "METHODS", "WITHOUT_DERIVATIVE", "asked", "installed", "load", "record"]

METHODS: dict[str, dict[str, Any]] = {
    "igos++": {"preset": "fast"}, "gradcam": {}, "tmm": {}, "iia": {}, "integrated_gradients": {"steps": 8},
    "input_gradient": {}, "attention": {}, "rollout": {}, "tam": {}, "rise": {"masks": 32}, "occlusion": {"size": 6},
    "greedy": {"segments": "grid", "regions": 6},
}  # fmt: skip
"""Methods, small; the first six differentiate."""


def _bitsandbytes(**settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings)


def _torchao(made: Callable[[Any], Any]) -> Any:
    import torchao.quantization as torchao
    from transformers import TorchAoConfig

    return TorchAoConfig(made(torchao))


def _int4_on_a_cpu(_torchao: Any) -> Any:
    """torchao's int4 for CPUs; the one of ``torchao.quantization`` needs a GPU and another library (mslk)."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32)


def _quanto() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def _int4_unpacked(torchao: Any) -> Any:
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


KINDS: dict[str, tuple[str, float, Callable[[], Any]]] = {
    "bitsandbytes int8": ("bitsandbytes", 8, lambda: _bitsandbytes(load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", 4, lambda: _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )),
    "bitsandbytes nf4, double": ("bitsandbytes", 4, lambda: _bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )),
    "torchao int8": ("torchao", 8, lambda: _torchao(lambda torchao: torchao.Int8WeightOnlyConfig())),
    "torchao int4, unpacked": ("torchao", 8, lambda: _torchao(_int4_unpacked)),
    "torchao float8": ("torchao", 8, lambda: _torchao(lambda torchao: torchao.Float8WeightOnlyConfig())),
    "HQQ int8": ("hqq", 8, lambda: 8),
    "HQQ int4": ("hqq", 4, lambda: 4),
    "quanto int8": ("optimum.quanto", 8, _quanto),
}  # fmt: skip
"""Name → the library, bits that a weight is kept in, its configuration. All of these can be differentiated."""
WITHOUT_DERIVATIVE: dict[str, tuple[str, float, Callable[[], Any]]] = {
    "torchao int4": ("torchao", 4, lambda: _torchao(_int4_on_a_cpu)),
    "torchao int8, activations too": (
        "torchao", 8, lambda: _torchao(lambda torchao: torchao.Int8DynamicActivationInt8WeightConfig())
    ),
}  # fmt: skip
"""The first kernel's backward raises, the second drops the graph."""


def installed(library: str) -> bool:
    """Whether a library of ``KINDS`` can be imported here."""
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


def load(kind: str, *, tower: bool = True) -> Any:
    """The embedded model in bfloat16 with the weights of its linear layers quantised; ``"float32"`` and ``"bfloat16"``
    are not.

    Args:
        kind: of ``KINDS`` or ``WITHOUT_DERIVATIVE``.
        tower: quantise the image encoder and the projector too.
    """
    from transformers import AutoModelForImageTextToText

    source = probe.demo.path()
    if kind in ("float32", "bfloat16"):
        return AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, kind)).eval()
    library, _, configured = {**KINDS, **WITHOUT_DERIVATIVE}[kind]
    if library == "hqq":  # transformers 5.23 has no way of quantising with it while loading
        return _with_hqq(AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16), configured())
    config = configured()
    if not tower:
        config.modules_to_not_convert = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    return AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).eval()


def _with_hqq(model: Any, bits: int) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    settings = BaseQuantizeConfig(nbits=bits, group_size=64)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, name = path.rpartition(".")
            made = HQQLinear(module, settings, compute_dtype=torch.bfloat16, device="cpu")
            setattr(model.get_submodule(parent), name, made)
    return model.requires_grad_(False).eval()


def asked(model: Any, processor: Any) -> Any:
    """Inputs of the first scene's question."""
    (scene,) = probe.demo.scenes(1)
    return processor.apply_chat_template(
        scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)


def record(model: Any, processor: Any, folder: Any) -> Any:
    """A recording of the answer to it, without faults."""
    with probe.attach(model, processor) as attached, attached.record(folder) as recording:
        model.generate(**asked(model, processor), max_new_tokens=10, do_sample=False)
    assert not recording.faults, recording.faults
    return recording.traces[-1]


if __name__ == "__main__":  # which of them are there
    missing = sorted({library for library, _, _ in KINDS.values() if not installed(library)})
    print("missing: " + ", ".join(missing) if missing else "all libraries are there")
    sys.exit(bool(missing))
