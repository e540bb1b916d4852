"""A checkup: what is here and works, of the environment and of a model, and what mends the rest.

It is made for broken environments, so each check stands alone: whatever it runs into becomes a finding, and the next
check is made. Nothing is installed or changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from lvlm_probe._version import __version__
from lvlm_probe.cli.shared.answers import ask
from lvlm_probe.cli.shared.models import load_model, model_source, torch_dtype, torch_place
from lvlm_probe.cli.shared.terminal import bar, one_line
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import first_line

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

_PYTHON = (3, 11)
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Required distributions whose module has another name."""
_REQUIRED = ("torch>=2.4", "transformers>=5.18,<6", "numpy", "pillow", "pyyaml", "h5py", "matplotlib", "rich", "tqdm")
"""What is looked for where the package runs from its sources, without metadata."""
_QUESTION = "What is in the image?"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        state: ``"ok"``; ``"note"``: it works without; ``"mend"``: something does not work.
        text: What was found, a sentence at most.
        install: What pip installs to mend it, with the options that it needs for that.
    """

    name: str
    state: Literal["ok", "note", "mend"]
    text: str
    install: tuple[str, ...] = ()


def mending(found: Sequence[Finding]) -> list[str]:
    """Return the command that mends what is not well; several where pip needs other options for a part of it."""
    wanted: dict[tuple[str, ...], list[str]] = {}
    for one in found:
        if one.state == "mend" and one.install:
            options = tuple(item for item in one.install if item.startswith("--"))
            wanted.setdefault(options, []).extend(item for item in one.install if item not in options)
    return [shlex.join(["pip", "install", *options, *dict.fromkeys(names)]) for options, names in wanted.items()]


def _why(error: BaseException) -> str:
    """Return what an error says, in a line, and what it comes from; of our own errors the whole sentence.

    Libraries that import others late hide the cause: "Could not import module 'LlamaConfig'".
    """
    if isinstance(error, ProbeError):
        return str(error)
    inner, seen = error, {id(error)}
    while True:
        below = inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)
        if below is None or id(below) in seen:
            break
        seen.add(id(below))
        inner = below
    said, cause = first_line(error), first_line(inner)
    return said if said == cause else f"{said} ({cause})"


def _refused(name: str, error: Exception, *, what: str = "") -> Finding:
    """The finding of an error: the library that is missing, and what installs it, or else what the error says."""
    with contextlib.suppress(ImportError):  # torch may be what is broken
        from lvlm_probe.models.requirements import missing_library

        if (library := missing_library(error)) is not None:
            # What is there and broken is a finding of the environment, which knows what matches.
            install = () if library.fault else tuple(shlex.split(library.remedy)[2:])
            return Finding(name, "mend", f"{what}{library}", install)
    return Finding(name, "mend", what + one_line(_why(error), 500))


def _checked(name: str, check: Callable[[], Finding | None]) -> Iterator[Finding]:
    """What a check finds; what it raises is a finding too."""
    try:
        found = check()
    except Exception as error:
        found = _refused(name, error)
    if found is not None:
        yield found


# --------------------------------------------------------------------------------------------------------- environment


def environment() -> Iterator[Finding]:
    """Look at Python, the libraries, the extras and the device."""
    yield from _checked("python", _python)
    yield Finding("lvlm-probe", "ok", f"{__version__}, {Path(__file__).parents[2]}")
    required, extras = _requirements()
    others = []
    for line in required:
        found = list(_checked(_name_of(line), functools.partial(_library, line)))
        shown = [one for one in found if one.state != "ok" or one.name in ("torch", "transformers")]
        others += [f"{one.name} {one.text}" for one in found if one not in shown]
        yield from shown
    if others:
        yield Finding("libraries", "ok", ", ".join(others))
    yield from _checked("torchvision", _torchvision)
    yield from _checked("extras", lambda: _extras(extras))
    yield from _checked("device", _device)


def _python() -> Finding:
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < _PYTHON:
        return Finding("python", "mend", f"{text}: {_PYTHON[0]}.{_PYTHON[1]} or newer is needed")
    return Finding("python", "ok", text)


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What the package requires, and what each extra brings."""
    try:
        lines = metadata.requires("lvlm-probe") or []
    except metadata.PackageNotFoundError:
        return list(_REQUIRED), {}
    required = [line for line in lines if "extra ==" not in line]
    extras: dict[str, list[str]] = {}
    for line in lines:
        found = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if found and found[1] not in ("dev", "all"):
            extras.setdefault(found[1], []).append(line.partition(";")[0].strip())
    return required, extras


def _name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found[0].lower() if found else requirement


def _library(requirement: str) -> Finding:
    """A library that is needed: there, of a version in range, and importable."""
    plain = requirement.partition(";")[0].strip()
    name = _name_of(plain)
    version = version_of(name)
    if version is None:
        return Finding(name, "mend", "is not installed", (plain,))
    if not _fits(version, plain):
        return Finding(name, "mend", f"{version}, but {plain} is needed", (plain,))
    module, fault = _imported(_MODULES.get(name, name))
    if module is None:
        return Finding(name, "mend", f"{version} cannot be imported: {fault}", ("--force-reinstall", plain))
    return Finding(name, "ok", version)


def version_of(name: str) -> str | None:
    """Return the version of a distribution, or ``None`` where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, requirement: str) -> bool:
    try:
        from packaging.requirements import Requirement

        return Requirement(requirement).specifier.contains(version, prereleases=True)
    except (ImportError, ValueError):
        return True  # nothing to compare with


def _imported(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a library that does not match another raises whatever it likes
        return None, one_line(_why(error), 300)


def _torchvision() -> Finding:
    version = version_of("torchvision")
    if version is None:
        text = "not installed: most models work without; a model that needs it says so (lvlm-probe doctor MODEL)"
        return Finding("torchvision", "note", text)
    module, fault = _imported("torchvision")
    if module is not None:
        return Finding("torchvision", "ok", version)
    torch = version_of("torch")
    pinned = next((line for line in metadata.requires("torchvision") or [] if _name_of(line) == "torch"), "")
    wanted = pinned.partition(";")[0].strip()
    if torch is not None and wanted and not _fits(torch, wanted):
        text = f"{version} was built for {wanted}, and torch is {torch}: {fault}"
        # With torch pinned, which pip would replace otherwise.
        return Finding("torchvision", "mend", text, ("--upgrade", "torchvision", f"torch=={torch.partition('+')[0]}"))
    text = f"{version} cannot be imported, and transformers then fails to load models: {fault}"
    return Finding("torchvision", "mend", text, ("--force-reinstall", "--no-deps", f"torchvision=={version}"))


def _extras(extras: dict[str, list[str]]) -> Finding | None:
    if not extras:
        return None
    here, missing = [], []
    for name, lines in extras.items():
        versions = [(_name_of(line), version_of(_name_of(line)), line) for line in lines]
        if any(version is None for _, version, _ in versions):
            missing.append(name)
            continue
        wrong = [f"{who} {version} (needs {line})" for who, version, line in versions if not _fits(version or "", line)]
        if wrong:
            return Finding("extras", "mend", f"{name}: {', '.join(wrong)}", (f"lvlm-probe[{name}]",))
        here.append(name)
    text = f"installed: {', '.join(here) or 'none'}"
    if missing:
        text += f"; not: {', '.join(missing)} (pip install 'lvlm-probe[{missing[0]}]', or [all])"
    return Finding("extras", "note" if missing else "ok", text)


def _device() -> Finding | None:
    torch, _ = _imported("torch")
    if torch is None:
        return None  # said above
    from lvlm_probe.planning import show_bytes

    place = torch_place(None)
    dtype = torch_dtype(None, place)
    name, free = _memory(place)
    text = f"{name}, {'the dtype of the checkpoint' if dtype == 'auto' else dtype}; {show_bytes(free)} free"
    if place.type == "cpu" and shutil.which("nvidia-smi"):
        text += f"; there is an NVIDIA driver, but torch {torch.__version__} finds no CUDA device (nvidia-smi says why)"
        return Finding("device", "note", text)
    return Finding("device", "ok", text)


def _memory(place: Any) -> tuple[str, int]:
    """A device's name and its free bytes."""
    import torch

    from lvlm_probe.planning.meter import available

    if place.type == "cuda":
        return f"{place} ({torch.cuda.get_device_name(place)})", torch.cuda.mem_get_info(place)[0]
    return str(place), available()


# --------------------------------------------------------------------------------------------------------------- model


def model_checks(
    spec: str, *, device: str | None, dtype: str | None, attn: str | None, trust_remote_code: bool, attempt: bool
) -> Iterator[Finding]:
    """Look at a model: its family, processor, prompt and memory; then, if it fits, at what one answer records.

    Args:
        attempt: load the model and record a short answer about a drawn image.
    """
    try:
        source = model_source(spec)
        place = torch_place(device)
        precision = torch_dtype(dtype, place)
    except Exception as error:
        yield Finding("model", "mend", one_line(_why(error), 500))
        return
    looked = _Model(source, place, precision, attn, trust_remote_code)
    found: list[Finding] = []
    for name, check in (
        ("model", looked.family),
        ("processor", looked.reader),
        ("prompt", looked.prompt),
        ("memory", looked.memory),
    ):
        here = list(_checked(name, check))
        yield from here
        found += here
    if not attempt:
        return
    if any(one.state == "mend" for one in found):
        yield Finding("answer", "note", "not tried: the above comes first")
        return
    options = {"device": device, "dtype": dtype, "attn": attn, "trust_remote_code": trust_remote_code}
    yield from _answered(spec, options)


class _Model:
    """A model that is looked at without its weights."""

    def __init__(self, source: str, place: Any, precision: str, attn: str | None, trusted: bool) -> None:
        self.source, self.place, self.precision = source, place, precision
        self.attn, self.trusted = attn, trusted
        self.config: Any = None
        self.processor: Any = None
        self.bare: Any = None

    def family(self) -> Finding:
        from transformers import AutoConfig

        from lvlm_probe.models.families import family_of
        from lvlm_probe.models.support import family_table
        from lvlm_probe.plugins import load_plugins

        load_plugins()  # one of them may bring the family
        self.config = AutoConfig.from_pretrained(self.source, trust_remote_code=self.trusted)
        name = str(self.config.model_type)
        kind = ", ".join(getattr(self.config, "architectures", None) or ()) or type(self.config).__name__
        try:
            self.bare = self._without_weights()
        except Exception as error:
            return _refused("model", error, what=f"{kind} ({name}): ")
        declared = family_of(name)
        if declared is not None and declared.unsupported:
            return Finding("model", "mend", f"{kind} ({name}) cannot be probed: {declared.unsupported}")
        known = {family.name: family for family in family_table().lvlms}.get(name)
        if known is None:
            return Finding("model", "ok", f"{kind} ({name}); not among the families that were checked")
        state = "passes every check of its family" if known.passed else "fails a check of its family"
        return Finding("model", "ok" if known.passed else "note", f"{kind}; {state} (lvlm-probe families {name})")

    def _without_weights(self) -> Any:
        """The model's modules on the meta device. Raises what transformers raises, or says it better."""
        from lvlm_probe.models.loading import without_weights

        try:
            return without_weights(self.config, trust_remote_code=self.trusted, attn=self.attn)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            text = "it is no vision-language model that transformers can load (AutoModelForImageTextToText)"
            raise ProbeError(text) from None

    def reader(self) -> Finding:
        from lvlm_probe.models.loading import load_processor

        try:
            self.processor = load_processor(self.source, trust_remote_code=self.trusted)
        except Exception as error:
            return _refused("processor", error, what="cannot be loaded: ")
        images = getattr(self.processor, "image_processor", None)
        if images is None:
            text = f"{type(self.processor).__name__} takes no images: save the model together with its own processor"
            return Finding("processor", "mend", text)
        return Finding("processor", "ok", f"{type(self.processor).__name__} with {type(images).__name__}")

    def prompt(self) -> Finding | None:
        if self.processor is None:
            return None
        from lvlm_probe.models.prompts import chat_inputs, prompt_rule
        from lvlm_probe.models.tokenizers import tokenizer_of

        said: list[str] = []
        rule = prompt_rule(self.processor, self.bare)
        question = _QUESTION if rule is None or rule.asks else ""
        inputs = chat_inputs(self.processor, [_image()], question, rule=rule, note=said.append)
        text = "no chat template" if said else "chat template"
        tokens, ids = tokenizer_of(self.processor), inputs.get("input_ids")
        if tokens is None or ids is None:
            return Finding("prompt", "ok", text)
        shown = one_line(_folded(tokens, ids[0].tolist()), 200)
        return Finding("prompt", "note" if said else "ok", f"{text}, {ids.shape[-1]} tokens: {shown}")

    def memory(self) -> Finding | None:
        if self.bare is None:
            return None
        import torch

        from lvlm_probe.planning import show_bytes, weight_bytes

        if getattr(self.config, "quantization_config", None) is not None:
            return Finding("memory", "note", "quantised: what its weights take shows when it is loaded")
        own = getattr(self.config, "dtype", None) or torch.float32
        wanted = own if self.precision == "auto" else getattr(torch, self.precision)
        bytes_ = weight_bytes(self.bare.to(wanted))
        attention = self.bare.config._attn_implementation
        name, free = _memory(self.place)
        weights = f"weights {show_bytes(bytes_)} of {show_bytes(free)} free on {name}"
        text = f"{weights}; {str(wanted)[6:]}, attention by {attention}"
        if bytes_ < free:
            return Finding("memory", "ok", text)
        way_out = "a smaller --dtype (bfloat16), another --device, or load it quantised or with device_map='auto'"
        return Finding("memory", "mend", f"{text}: it does not fit; {way_out}")


def _folded(tokenizer: Any, ids: Sequence[int]) -> str:
    """A prompt with long runs of one token counted: image tokens are hundreds."""
    runs = [(token, len(list(run))) for token, run in itertools.groupby(ids)]
    shown: list[str] = []
    waiting: list[int] = []
    for token, count in runs:
        if count > 3:
            shown += [tokenizer.decode(waiting), f"{tokenizer.decode([token])}×{count}"]
            waiting = []
        else:
            waiting += [token] * count
    return "".join([*shown, tokenizer.decode(waiting)])


def _image() -> Any:
    from lvlm_probe.demo import scenes

    return scenes(1)[0].image


def _answered(spec: str, options: dict[str, Any]) -> Iterator[Finding]:
    """Load the model, record a short answer, and say what can be explained of it."""
    from lvlm_probe.models.prompts import prompt_rule
    from lvlm_probe.replaying import replay

    with tempfile.TemporaryDirectory(prefix="lvlm_probe_doctor_") as folder:
        try:
            model, processor = load_model(spec, **options)
            rule = prompt_rule(processor, model)
            question = _QUESTION if rule is None or rule.asks else None
            trace = ask(model, processor, [_image()], question, Path(folder), max_new_tokens=8)
            answer = replay(trace, model, processor)
        except Exception as error:
            yield _refused("answer", error)
            return
        yield Finding("answer", "ok", f"{len(trace.token_ids)} tokens recorded and replayed: {trace.answer.strip()!r}")
        yield from _checked("recorded", lambda: _recorded(trace))
        yield from _checked("boxes", lambda: _boxes(answer))
        yield from _methods(answer)


def _recorded(trace: Any) -> Finding:
    parts = [f"{len(trace.image_positions)} image tokens"]
    rows = trace.attention
    if rows is None:
        parts.append("no attention: " + (next((note for note in trace.notes if "attention" in note), "not recorded")))
    else:
        _, layers, heads, keys = rows.values.shape
        parts.append(f"attention of {layers} layers × {heads} heads to {keys} keys")
    parts.append("log-likelihood ratios" if trace.llr is not None else "no log-likelihood ratios")
    return Finding("recorded", "note" if rows is None else "ok", one_line("; ".join(parts), 400))


def _boxes(answer: Replay) -> Finding:
    from lvlm_probe.boxes.image_tokens import image_tokens

    try:
        tokens = image_tokens(answer, 0, cross=True)
    except ProbeError as error:
        return Finding("boxes", "note", one_line(f"methods per image token do not work: {error}", 400))
    return Finding("boxes", "ok", f"known for {len(tokens.placed)} of {len(tokens)} image tokens")


def _methods(answer: Replay) -> Iterator[Finding]:
    """Which methods run on this answer, and what explaining takes."""
    from lvlm_probe.explainers import methods
    from lvlm_probe.planning import plan_for, show_bytes

    names, refused, plan = methods(), {}, None
    with bar("trying the methods") as advance:
        for number, name in enumerate(names):
            advance(number, len(names))
            try:
                made = plan_for(answer, name, {})
                plan = made if name == "igos++" else plan
            except Exception as error:
                refused[name] = one_line(_why(error), 200)
    if plan is not None and plan.peak is not None:
        text = f"igos++ takes {show_bytes(plan.peak)} beside the weights, of {show_bytes(plan.budget)}"
        yield Finding("explaining", "ok", f"{text}; other methods: lvlm-probe plan")
    works = [name for name in names if name not in refused]
    yield Finding("methods", "ok" if works else "mend", f"{len(works)} of {len(names)}: {', '.join(works)}")
    for name, reason in refused.items():
        yield Finding(name, "note", reason)
