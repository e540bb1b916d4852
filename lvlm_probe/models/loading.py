"""Loading a model and its processor from a directory or the hub, with and without torchvision.

Processors of families that also take videos consist of a tokenizer, an image processor and a video processor, and the
last one needs torchvision. Where that is not installed, the processor's own class is made with the video processor's
saved settings in its place: images and text go through the same code either way, and videos are not recorded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.errors import LoadError, ProbeError
from lvlm_probe.escaping import first_line
from lvlm_probe.files import path_of
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.families import family_of
from lvlm_probe.models.quantised import quantisation
from lvlm_probe.models.requirements import Missing, missing_library
from lvlm_probe.plugins import load_plugins
from lvlm_probe.process import lock

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ONE_LOAD = lock()
"""Held while transformers makes a model. It replaces ``PreTrainedModel.tie_weights`` and torch's default dtype for the
whole process meanwhile, and puts back what it found: of two loads at once the second one puts back what the first had
put there, and from then on no model of the process has its weights tied."""


@naming_arguments
def load(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a vision-language model, in eval mode, and its processor.

    A short cut for ``AutoModelForImageTextToText`` and ``AutoProcessor``; a probe attaches to what those give just as
    well.

    Args:
        source: a model directory or a hub id.
        device: where to put it; by default CUDA where there is one, else the CPU. Apple's ``mps`` is taken only when
            asked for: all that ran on it so far are the tests of a pretended one.
        dtype: of the weights; ``"auto"`` for that of the checkpoint, which is the default on a GPU and for quantised
            weights. On the CPU it is float32.
        attn: ``"sdpa"``, ``"eager"``, ...; by default transformers' choice.
        device_map: ``"auto"`` spreads a model over all devices by accelerate; ``device`` is then not used.
        trust_remote_code: run the code that comes with the model, for one that transformers does not know. Without it
            such a model is refused, and nobody is asked.

    Plugins are loaded where transformers does not know the model's type, so that a family which an installed plugin
    brings opens without an import by the user.

    Raises:
        LoadError: there is no such model, it is no vision-language model, or a library that it needs is missing or
            broken, and the message says what to install; no such device or number format is here.
    """
    place = _device(device)
    dtype = _number_format(dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn is not None:
        options["attn_implementation"] = attn
    if device_map is not None:
        options["device_map"] = device_map
    source = located(source)
    with loading(source):
        # The processor first: it takes no time, and most of what can be missing is missing there.
        processor = load_processor(source, trust_remote_code=trust_remote_code)
        from transformers import AutoModelForImageTextToText, PreTrainedConfig

        # What is not quantised in such a checkpoint computes in the format it was saved in, beside the rest.
        quantised = bool(quantisation(PreTrainedConfig.get_config_dict(source)[0]))
        if quantised and device_map is None and place.type != "cpu":
            options["device_map"] = {"": place}  # some of these weights cannot be moved once they are loaded
        plain = place.type == "cpu" and device_map is None and not quantised
        options["dtype"] = dtype if dtype is not None else torch.float32 if plain else "auto"
        with ONE_LOAD:
            model = AutoModelForImageTextToText.from_pretrained(source, **options).eval()
    return model if "device_map" in options else model.to(place), processor


def _device(device: torch.device | str | None) -> torch.device:
    """The device, before anything is loaded for it. Raises ``LoadError`` where it is not here."""
    if device is None:
        return default_device()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without
        raise LoadError(
            f"no device {device!r} is here ({first_line(error, 120)}): give another one, as cpu or cuda:1, or none"
        ) from error
    return place


def _number_format(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """What weights can be computed in. Raises ``LoadError`` for anything else."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto") or (isinstance(found, torch.dtype) and found.is_floating_point):
        return dtype if found is None else found
    raise LoadError(f"dtype is 'auto', float32, bfloat16, float16 or another floating-point format; got {dtype!r}")


def default_device() -> torch.device:
    """Return where models go by default: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def loading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what transformers raises inside the block into a ``LoadError`` of one sentence, the cause kept.

    Running out of memory, and errors of this package, pass as they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ProbeError) or ran_out(error):
            raise
        raise LoadError(_why(source, error)) from error


def located(source: str | os.PathLike[str]) -> str:
    """Return what ``from_pretrained`` is given. What looks like a path is never looked up on the network.

    Raises:
        LoadError: it is neither a model directory nor the form of a hub id.
    """
    path_of(source, "a model", LoadError)
    spec = os.fspath(source)
    if "\0" in spec:
        raise LoadError("a model is a directory or a hub id (owner/name); this name has a NUL in it")
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"{path} is no model directory: it has no config.json; save one with model.save_pretrained")
        return str(path)
    if path.is_file():
        raise LoadError(f"{path} is a file; a model is a directory or a hub id (owner/name)")
    looks_like_path = spec.startswith((".", "/", "~", "\\")) or spec.count("/") != 1 or spec.endswith("/")
    if looks_like_path or isinstance(source, os.PathLike):
        raise LoadError(f"no model directory at {spec}; a model is a directory or a hub id (owner/name)")
    return spec


def _why(source: str | os.PathLike[str], error: Exception) -> str:
    """Why a model cannot be loaded, and what to do about it."""
    message, spec = str(error), os.fspath(source)
    if "Unrecognized configuration class" in message:
        return (
            f"{spec} is not a vision-language model that transformers can load "
            f"(AutoModelForImageTextToText does not know its configuration)"
        )
    if "trust_remote_code" in message:
        return (
            f"{spec} brings code of its own, which is not run unasked; read it, and if you trust it, load it with "
            f"trust_remote_code=True (command line: --trust-remote-code)"
        )
    if (library := missing_library(error)) is not None:
        return f"{spec} cannot be loaded: {library}"
    first = first_line(error)
    if not Path(spec).is_dir():
        return (
            f"{spec} is no directory here, and as a hub id it could not be loaded: {first} "
            f"Check the spelling and the network, or give a model directory"
        )
    return f"{spec} cannot be loaded as a vision-language model with a processor: {first}"


def without_weights(
    config: PreTrainedConfig, *, trust_remote_code: bool = False, attn: str | None = None
) -> torch.nn.Module:
    """Make the modules of a vision-language model on the meta device. Raises what transformers raises."""
    from transformers import AutoModelForImageTextToText

    given = {} if attn is None else {"attn_implementation": attn}
    with ONE_LOAD, torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code, **given)


def load_processor(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """``AutoProcessor.from_pretrained``, also for families that take videos where torchvision is not installed."""
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    _register_family(source)
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError):  # OSError: saved without its video processor
        if is_torchvision_available():
            raise
        processor_class = _processor_class(source, trust_remote_code)
        if processor_class is None or "video_processor" not in processor_class.get_attributes():
            raise
    return _without_video(processor_class, source).from_pretrained(source, trust_remote_code=trust_remote_code)


def _register_family(source: str | os.PathLike[str]) -> None:
    """Loads plugins if the model's type is not known to transformers; one of them may register it.

    Raises:
        ImportError: a library is declared to be needed by the family, and is not installed.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return  # loading will say what is wrong with it
    model_type = settings.get("model_type")
    if model_type and model_type not in CONFIG_MAPPING:
        load_plugins()
    for library in getattr(family_of(model_type) if isinstance(model_type, str) else None, "needs", ()):
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"{model_type} requires the library {library}: pip install {library}")


def _saved(source: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """What a JSON file of a saved model holds; empty where there is none."""
    from transformers.utils import cached_file

    quiet = dict.fromkeys(
        (f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors")), False
    )
    path = cached_file(source, name, **quiet)
    found = json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    return found if isinstance(found, dict) else {}


def _processor_class(source: str | os.PathLike[str], trust_remote_code: bool) -> Any:
    """The class that ``AutoProcessor`` takes: the one that was saved, else that of the model's type.

    ``None`` for a class that comes with the model, or that needs a library itself.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig
    from transformers.models.auto.processing_auto import processor_class_from_name

    try:
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json"):
            if name := _saved(source, file).get("processor_class"):
                found = processor_class_from_name(name)
                break
        else:
            config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            found = PROCESSOR_MAPPING.get(type(config), None)
    except (OSError, ValueError):
        return None  # what AutoProcessor said stands
    return None if getattr(found, "is_dummy", False) else found


def _without_video(processor_class: Any, source: str | os.PathLike[str]) -> Any:
    """The class to load a processor by: the parts but the video processor, whose settings are put in its place."""
    from transformers.video_processing_utils import BaseVideoProcessor

    try:
        settings, _ = BaseVideoProcessor.get_video_processor_dict(source)
    except (OSError, ValueError):  # saved without one
        settings = {}
    parts = processor_class.get_attributes()
    place = parts.index("video_processor")

    class Processor(processor_class):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if isinstance(argument, _VideoSettings):
                return type(argument)
            return super().check_argument_for_proper_class(name, argument)

        def to_dict(self) -> dict[str, Any]:
            saved = super().to_dict()
            saved.pop("video_processor", None)
            return {**saved, "video_processor": dict(settings)} if settings else saved

    class Loader(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in parts if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **options: Any) -> Any:
            whole = [*args[:place], _VideoSettings(settings), *args[place:]]
            return Processor.from_args_and_dict(whole, processor_dict, **options)

    for made in (Processor, Loader):
        made.__name__, made.__qualname__ = processor_class.__name__, processor_class.__qualname__
        made.__module__ = processor_class.__module__
    return Loader


class _VideoSettings:
    """Stands where a video processor would: its saved settings, and a sentence for everything else."""

    _auto_class = None  # as a part of a processor that is saved: no code of its own

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._settings:
            raise AttributeError(f"no {name!r}: {Missing('torchvision', 'the video processor')}")
        return self._settings[name]

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ProbeError(f"videos cannot be prepared: {Missing('torchvision', 'the video processor')}")
