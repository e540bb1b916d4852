"""Models by name, directory or hub id, with their processors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lvlm_probe.cli.shared.terminal import quiet_libraries, stage
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import first_line

if TYPE_CHECKING:
    import torch

DEMO = "demo"
"""The name of the embedded model, wherever a model is asked for."""


def load_model(
    spec: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[torch.nn.Module, Any]:
    """Load a model and its processor.

    Args:
        spec: a directory, a hub id, or ``"demo"``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; by default CUDA where there is one, else the CPU.
            Apple's ``mps`` is taken only when asked for: all that ran on it so far are the tests of a pretended one.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"`` (the checkpoint's). Default: float32 on the
            CPU, else auto, and auto for quantised weights.
        attn: attention implementation, ``"sdpa"`` or ``"eager"``.
        trust_remote_code: run code that comes with the model.

    Raises:
        ProbeError: there is no such model, it is no vision-language model, or it cannot be loaded so.
    """
    with stage(f"loading {spec}"):
        quiet_libraries()
        import torch

        from lvlm_probe.models.loading import load

        source = model_source(spec)
        place = torch_place(device)
        precision = torch_dtype(dtype, place)
        weights = precision if precision == "auto" else getattr(torch, precision)
        weights = weights if dtype is not None else None  # quantised ones have another default
        try:
            model, processor = load(source, device=place, dtype=weights, attn=attn, trust_remote_code=trust_remote_code)
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, ProbeError):
                raise
            raise ProbeError(f"{spec} cannot be put on {place}: {first_line(error)}; try --device cpu") from error
        if getattr(processor, "image_processor", None) is None:
            raise ProbeError(
                f"{spec} has no image processor, so it takes no images ({type(processor).__name__}); "
                f"give a vision-language model saved together with its processor"
            )
        return model, processor


def model_source(spec: str) -> str:
    """Return what ``from_pretrained`` is given. A path is never looked up on the network."""
    from lvlm_probe.models.loading import located

    if spec == DEMO:
        from lvlm_probe import demo

        return str(demo.path())
    return located(spec)


def torch_dtype(name: str | None, place: torch.device) -> str:
    """Return the name of a dtype of weights on a device. Raises ``ProbeError`` for one that torch does not have."""
    import torch

    precision = name or ("float32" if place.type == "cpu" else "auto")
    if precision != "auto" and not isinstance(getattr(torch, precision, None), torch.dtype):
        raise ProbeError(f"no dtype {precision!r}; use float32, bfloat16, float16 or auto")
    return precision


def torch_place(name: str | None) -> torch.device:
    """Return a device by name, or the default one. Raises ``ProbeError`` where there is none of that name."""
    import torch

    from lvlm_probe.models.loading import default_device

    if name is None:
        return default_device()
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ProbeError(f"no device {name!r}; use cpu, cuda, cuda:1 or mps") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ProbeError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return place
