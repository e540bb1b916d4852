"""Models of packages that are not transformers' own: a driver lends them the shape that recording and replay expect.

Some authors publish a model whose ``generate`` and ``forward`` take lists of images, keep state between calls, or run
their encoders without autograd. A plugin registers a ``Driver`` for such a class: a module around the user's own,
unmodified instance, with named pixel inputs and a forward pass like that of a transformers model. The instance itself
is changed by nobody but the driver, during its own passes, and put back after each.

::

    register_original("my_package", matches=lambda model: hasattr(model, "my_encode"), adapt=MyDriver)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lvlm_probe.errors import PluginError
from lvlm_probe.hooks import HookSet
from lvlm_probe.models.families import Family, built_in
from lvlm_probe.models.wrappers import generating_model
from lvlm_probe.plugins import check_registration, load_plugins


class Driver(torch.nn.Module):
    """A model of another package in the shape of a transformers model; subclass it in a plugin.

    A subclass sets ``family`` and implements ``arguments``, ``forward`` and ``with_pixels``. Encoders that the package
    keeps out of its module tree (in a list) are given to ``adopt``, whatever the processor, so that they are found.

    Args:
        original: the user's instance.
        processor: what the user attached with it, or ``None``.

    Attributes:
        original: the user's instance.
        family: where its parts are, relative to the driver, and where image tokens lie.
    """

    original: Any
    family: Family

    def __init__(self, original: torch.nn.Module, processor: object | None) -> None:
        super().__init__()
        self.original = original
        self.training = original.training  # it has no mode of its own

    # ------------------------------------------------------------------ what a plugin writes

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The user's ``generate`` call in this driver's names: ``input_ids`` ``(1, P)`` with one placeholder per image
        token, the pixel inputs as tensors, ``attention_mask`` if there is one, and all other settings.

        Raises:
            lvlm_probe.recording.prompt_images.NotRecorded: this call cannot be recorded; the message says why.
        """
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        """One pass without a cache over what ``arguments`` made (any batch): an object with ``logits`` ``(batch,
        position, vocabulary)``. Differentiable in the pixel inputs."""
        raise NotImplementedError

    def with_pixels(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], pixels: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The user's ``generate`` call with other pixel inputs, given in this driver's names."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what all have

    def sequences(self, input_ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Prompt and answer, ``(row, position)``, from the token ids that ``generate`` returned: these packages begin
        with embeddings, so that the answer comes alone."""
        copies = max(1, len(output) // len(input_ids))
        return torch.cat([input_ids.repeat_interleave(copies, 0).to(output.device), output], dim=1)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The user's own ``generate``."""
        return self.original.generate(*args, **kwargs)

    @property
    def config(self) -> Any:
        return self.original.config

    @property
    def generation_config(self) -> Any:
        return getattr(self.original, "generation_config", None)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.original.dtype
        return found

    @property
    def device(self) -> torch.device:
        found: torch.device = self.original.device
        return found

    def get_input_embeddings(self) -> Any:
        return self.original.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.original.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.get_submodule(self.family.decoder or "original")

    def adopt(self, encoders: Iterable[torch.nn.Module]) -> None:
        """Makes encoders that the package keeps out of its module tree sub-modules of the driver, ``outside.0`` …: they
        are found, frozen during passes and count in the fingerprint."""
        inside = {id(module) for module in self.original.modules()}
        self.outside = torch.nn.ModuleList([encoder for encoder in encoders if id(encoder) not in inside])

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module is in this driver.

        Raises:
            PluginError: it is not part of it.
        """
        for path, found in self.named_modules():
            if found is module:
                return path
        raise PluginError(f"{type(module).__name__} is no part of {type(self.original).__name__} or of its driver")


@dataclass(frozen=True)
class Original:
    """How the models of one package are known and driven."""

    matches: Callable[[torch.nn.Module], bool]
    adapt: Callable[[torch.nn.Module, object | None], Driver]


_ORIGINALS: dict[str, Original] = {}


def register_original(
    name: str,
    *,
    matches: Callable[[torch.nn.Module], bool],
    adapt: Callable[[torch.nn.Module, object | None], Driver],
) -> None:
    """Registers a driver for the models of a package. Registering the same once more does nothing.

    Args:
        name: Of the package.
        matches: Whether a model is one of them, told by what it has; imports nothing.
        adapt: ``(model, processor)`` to its driver. Raises ``AttachError`` where this instance cannot be driven.

    Raises:
        PluginError: Another driver has this name, or an argument is not what it has to be.
    """
    check_registration("what matches the models of", name, matches, PluginError)
    check_registration("what adapts the models of", name, adapt, PluginError)
    made = Original(matches, adapt)
    if _ORIGINALS.setdefault(name, made) != made:
        raise PluginError(f"the name {name!r} is taken by another driver; uninstall one of the two plugins")


def probed_model(model: Any, processor: object | None = None) -> Any:
    """The model that is recorded and replayed: what generates inside wrappers, and of another package its driver.

    Raises:
        AttachError: The model cannot be driven; the message says why.
        PluginError: Two packages claim it.
    """
    inner = generating_model(model)
    if isinstance(inner, Driver) or built_in(_model_type(inner)):
        return inner
    if _model_type(inner):
        load_plugins()
    found = {name: original for name, original in _ORIGINALS.items() if original.matches(inner)}
    if len(found) > 1:
        raise PluginError(
            f"{type(inner).__name__} is claimed by the drivers {' and '.join(sorted(found))}; uninstall one of them"
        )
    for original in found.values():
        return original.adapt(inner, processor)
    return inner


def called_model(model: Any) -> Any:
    """The instance whose methods the user calls: of a driver the one it drives."""
    return model.original if isinstance(model, Driver) else model


def _model_type(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", "") or "")


# -------------------------------------------------------------------------------------------------- tools for drivers

_ABSENT = object()


@contextmanager
def attributes(owner: object, values: Mapping[str, Any]) -> Iterator[None]:
    """Instance attributes of ``owner`` for the block; its ``__dict__`` is put back, also on an exception."""
    own = vars(owner)
    before = {name: own.get(name, _ABSENT) for name in values}
    try:
        own.update(values)
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


@contextmanager
def open_gates(encoders: Iterable[torch.nn.Module], flag: str) -> Iterator[None]:
    """Lets gradients through encoders that switch autograd off in their ``forward``, where the caller has it on.

    Args:
        encoders: The wrappers whose ``forward`` holds the gate.
        flag: The attribute that opens it, read at each call. An encoder without it gets hooks on all modules inside,
            which switch autograd on again behind the gate; leaving the gate restores what was before.
    """
    if not torch.is_grad_enabled():
        yield
        return

    def on(_module: torch.nn.Module, _args: Any, _kwargs: Any) -> None:
        torch.set_grad_enabled(True)

    opened: list[tuple[dict[str, Any], Any]] = []
    with HookSet() as hooks:
        try:
            for encoder in encoders:
                if hasattr(encoder, flag):
                    opened.append((vars(encoder), vars(encoder).get(flag, _ABSENT)))
                    vars(encoder)[flag] = True
                    continue
                for module in encoder.modules():
                    if module is not encoder:
                        hooks.forward_pre(module, on, name="gradient gate", fenced=False)
            yield
        finally:
            for own, value in reversed(opened):
                if value is _ABSENT:
                    own.pop(flag, None)
                else:
                    own[flag] = value


def expanded(ids: torch.Tensor, mark: int, placeholder: int, count: int) -> torch.Tensor:
    """``(P,)`` token ids with one ``mark`` → with ``count`` placeholders in its place, ``(P - 1 + count,)``.

    Raises:
        ValueError: there is not exactly one mark.
    """
    at = (ids == mark).nonzero()[:, 0].tolist()
    if len(at) != 1:
        raise ValueError(f"the prompt holds {len(at)} images; exactly one is supported")
    return torch.cat([ids[: at[0]], ids.new_full((count,), placeholder), ids[at[0] + 1 :]])


def collapsed(ids: torch.Tensor, placeholder: int, mark: int) -> torch.Tensor:
    """The way back: each row's one run of placeholders becomes one ``mark``. ``(batch, P)`` of equal runs."""
    is_place = ids == placeholder
    first = is_place & ~torch.nn.functional.pad(is_place, (1, 0))[:, :-1]
    short = torch.where(first, mark, ids)[~is_place | first]
    return short.reshape(len(ids), -1)
