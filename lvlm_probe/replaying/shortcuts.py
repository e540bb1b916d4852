"""Shortcuts: what a pass need not compute for the tokens that are wanted, found by measuring on the model at hand.

Log-probabilities of some of the answer's tokens, as a function of a mask, do not depend on all that a plain pass
computes:

* tokens after the last wanted one are in its future: they are cut off;
* logits are wanted at the wanted tokens' positions only, and so is what stands after the last mixing of positions, the
  last layer's MLP;
* tokens before the first image token do not see the image: their keys and values are computed once per call, or once
  while the shortcuts are ``caching``, and read from the model's own cache.

None of this holds for every architecture (a beginning that attends both ways, positions that are numbered by what is
fed, state that no cache hands on, or not to several rows, layers in parallel), and names of families do not tell. So
the first use on a model runs one image both ways, plainly and shortened, and compares the log-probabilities and their
gradient to the mask; a cache is read for two images at once as well. What differs is not used; the plain pass always
remains. These passes are counted as the caller's. They ask for every other token of the answer's first half, whatever
the caller wants first: with the last one there would be no later tokens to cut, and nothing to see of what cutting them
does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from lvlm_probe.hooks import HookSet
from lvlm_probe.models.anatomy import Anatomy, text_stack
from lvlm_probe.models.exhaustion import ran_out
from lvlm_probe.models.wrappers import every_module
from lvlm_probe.replaying.isolation import autocast_dtype
from lvlm_probe.replaying.micro_batches import PassCounter
from lvlm_probe.replaying.teacher_forcing import Shortcut, TeacherForcing

_log = logging.getLogger("lvlm_probe")

_PAYS = 16
"""A cache is read where it spares at least every 16th position: making and copying it costs as much as fewer would."""

_TOLERANCE = {
    torch.float64: (1e-8, 1e-6),
    torch.float32: (3e-5, 3e-3),
    torch.bfloat16: (0.06, 0.3),
    torch.float16: (0.01, 0.1),
}
"""How far a shortened pass may be from the plain one, which rounds in another order: its log-probabilities, in nats per
1 + |log P|, and the length of the gradients' difference as a share of the gradient's."""


@dataclass(frozen=True)
class _Way:
    """Which shortcuts are taken. ``numbered``: positions are handed over, as a plain pass has numbered them."""

    prefix: bool = False
    numbered: bool = False
    narrow: str | None = None

    def __str__(self) -> str:
        parts = ["later tokens cut"]
        if self.prefix:
            parts.append("beginning read from a cache" + (", positions handed over" if self.numbered else ""))
        return ", ".join([*parts, f"{self.narrow} at wanted positions"] if self.narrow else parts)


@dataclass(frozen=True)
class _Found:
    """A way, or ``None`` for the plain pass alone, and how far it was from the plain pass where it was measured."""

    way: _Way | None
    log_probs: float = 0.0
    gradient: float = 0.0


_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[Any, _Found]] = WeakKeyDictionary()


class View(Protocol):
    """The view of a replay that asks: over some baseline, with some settings."""

    @property
    def device(self) -> torch.device: ...
    @property
    def n_images(self) -> int: ...
    @property
    def recomputes(self) -> bool: ...
    @property
    def passes(self) -> PassCounter: ...

    def masked_pass(self, mask: torch.Tensor, shortcut: Shortcut | None = None) -> torch.Tensor: ...


class Shortcuts:
    """The shortcuts of one answer on one model.

    Args:
        forcing: the pass that is shortened.
        model: the user's model, for which what is found holds.
        anatomy: its parts.
        prompt: ``(P,)`` token ids of the prompt.
        trace_id: of the answer, for the log.

    Attributes:
        start: positions before the first image token; 0 where a cache of them would not pay.
        asked: how many calls have asked for some tokens only.
        held: what is kept while the model does not change, by keys of whose it is; ``None`` unless ``caching``.
        way: what is left out; ``None`` before the first use, and where the plain pass is all that works.
        log_probs, gradient: how far that is from the plain pass, as measured on this model: largest difference, nats;
            length of the gradients' difference as a share of the gradient's.
    """

    def __init__(
        self, forcing: TeacherForcing, *, model: torch.nn.Module, anatomy: Anatomy, prompt: torch.Tensor, trace_id: str
    ) -> None:
        self._forcing, self._model, self._anatomy, self._trace_id = forcing, model, anatomy, trace_id
        places = torch.isin(prompt, torch.tensor(anatomy.placeholders, dtype=prompt.dtype))
        found = [] if anatomy.encoder_decoder else places.nonzero()[:, 0].tolist()
        pays = bool(found) and found[0] * _PAYS >= forcing.length and not forcing.separate
        self.start: int = found[0] if pays else 0
        self.asked = 0
        self.way: _Way | None = None
        self.log_probs = self.gradient = 0.0
        self._circumstances: Any = None
        self._position_ids: torch.Tensor | None = None
        self.held: dict[Any, Any] | None = None

    def __str__(self) -> str:
        return str(self.way) if self.way is not None else "plain passes"

    @contextmanager
    def caching(self) -> Iterator[None]:
        """In the block the model does not change, and what is before the image is computed once."""
        if self.held is not None:
            yield
            return
        held: dict[Any, Any] = {}
        self.held = held
        try:
            yield
        finally:
            self.held = None
            held.clear()  # hooks of past passes know it, and may wait for the collector

    def take(self, view: View, steps: tuple[int, ...]) -> Shortcut | None:
        """The parts that passes of ``view`` for the tokens ``steps`` leave out; ``None``: nothing.

        Layers that run again in backward can neither read a cache nor be narrowed.
        """
        self.asked += 1
        circumstances = self._present(view)
        try:
            if circumstances != self._circumstances:
                self._find(view, circumstances)
            if self.way is None:
                return None
            way = replace(self.way, prefix=False, narrow=None) if view.recomputes else self.way
            return self._shortcut(way, steps)
        except Exception as error:
            if not ran_out(error):
                raise
            _log.debug("%s: no memory for shortcuts", self._trace_id)
            return None

    def _shortcut(self, way: _Way, steps: tuple[int, ...]) -> Shortcut:
        if not way.prefix:
            return Shortcut(steps, narrow=way.narrow)
        places = self._position_ids if way.numbered else None
        past = None if self.held is None else self.held.get(way.numbered)
        if past is None:
            past = self._forcing.past(self.start, position_ids=places)
            if self.held is not None:
                self.held[way.numbered] = past
        return Shortcut(steps, start=self.start, past=past, position_ids=places, narrow=way.narrow)

    def _find(self, view: View, circumstances: Any) -> None:
        if self.held:
            self.held.clear()
        known = _KNOWN.setdefault(self._model, {})
        answer = self._forcing.steps
        steps = tuple(range(0, max(1, answer // 2), 2))
        key = (*circumstances, self.start > 0, answer > 1, self._forcing.rows)
        found = known.get(key)
        # Another prompt than the one that was measured may pass a limit of the model's (a window, a long context).
        if found is None or not self._holds(view, found, steps):
            found = known[key] = self._measured(view, steps)
        self.way, self.log_probs, self.gradient = found.way, found.log_probs, found.gradient
        self._circumstances = circumstances
        _log.debug("%s: %s, off by %.1e nats", self._trace_id, self, self.log_probs)

    def _measured(self, view: View, steps: tuple[int, ...]) -> _Found:
        """The most that gives what the plain pass gives."""
        observed: dict[str, Any] = {}
        try:
            with self._observing(observed):
                plain, slope = _differentiated(view, None, steps)
        except Exception as error:
            if ran_out(error):
                raise
            return _Found(None)  # the caller's own pass says what is wrong
        self._position_ids = observed.get("position_ids")
        most, most_gradient = self._tolerance
        for way in self._ways(observed.get("narrow")):
            try:
                shortcut = self._shortcut(way, steps)
                mine, my_slope = _differentiated(view, shortcut, steps)
                if way.prefix:  # state that is handed to several rows has to be seen by several
                    with torch.no_grad():
                        both = view.masked_pass(_pattern(view).repeat(2, 1, 1, 1), shortcut)
                    mine = torch.cat([mine, both[:, list(steps)]])
            except Exception as error:
                if ran_out(error):
                    raise
                _log.debug("%s goes without %s: %s", type(self._model).__name__, way, error)
                continue
            off = ((mine - plain).abs() / (1 + plain.abs())).max()
            off_gradient = float((my_slope - slope).norm() / slope.norm().clamp(min=1e-12))
            if bool(off <= most) and off_gradient <= most_gradient:
                return _Found(way, float((mine - plain).abs().max()), off_gradient)
            _log.debug("%s goes without %s: off by %g and %g", type(self._model).__name__, way, off, off_gradient)
        return _Found(None)

    def _ways(self, narrow: str | None) -> Iterator[_Way]:
        parts = dict.fromkeys((narrow, None))
        if self.start:
            for part in parts:
                yield _Way(prefix=True, narrow=part)
                if self._position_ids is not None:
                    yield _Way(prefix=True, numbered=True, narrow=part)
        for part in parts:
            yield _Way(narrow=part)

    def _holds(self, view: View, found: _Found, steps: tuple[int, ...]) -> bool:
        """Whether a way that is known to work on this model gives this prompt's log-probabilities too."""
        if found.way is None or not found.way.prefix:
            return True
        observed: dict[str, Any] = {}
        try:
            with torch.no_grad():
                with self._observing(observed):
                    plain = view.masked_pass(_pattern(view))[:, list(steps)]
                self._position_ids = observed.get("position_ids")
                mine = view.masked_pass(_pattern(view), self._shortcut(found.way, steps))[:, list(steps)]
        except Exception as error:
            if ran_out(error):
                raise
            return False
        return bool(((mine - plain).abs() / (1 + plain.abs())).max() <= self._tolerance[0])

    @property
    def _tolerance(self) -> tuple[float, float]:
        kind: Any = autocast_dtype(self._forcing.device) or getattr(self._model, "dtype", torch.float32)
        return _TOLERANCE.get(kind, _TOLERANCE[torch.float32])

    def _present(self, view: View) -> tuple[Any, ...]:
        """What a way that was found may depend on besides the weights, which it does not."""
        config = getattr(self._model, "config", None)
        with self._forcing.replica.use() as model:
            hung = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in every_module(model))
        return (
            getattr(config, "_attn_implementation", None),
            getattr(self._model, "dtype", None),
            view.n_images,
            tuple(sorted(self._forcing.names)),
            autocast_dtype(self._forcing.device),
            hung,
        )

    @contextmanager
    def _observing(self, observed: dict[str, Any]) -> Iterator[None]:
        """Observe, in a plain pass, how positions are numbered, and which part of the last layer takes one position at
        a time for all that can be seen: one tensor in, one of the same length out, nothing beside it."""
        length, decoder = self._forcing.length, self._anatomy.decoder

        def numbers(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            places = kwargs.get("position_ids")
            if isinstance(places, torch.Tensor) and places.ndim >= 2 and places.shape[-2:] == (1, length):
                observed["position_ids"] = places.detach().clone()

        sizes: dict[str, int] = {}

        def part(path: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                given = args[0] if len(args) == 1 and not kwargs else None
                if all(isinstance(item, torch.Tensor) and item.shape[:2] == (1, length) for item in (given, output)):
                    sizes[path] = sum(weight.numel() for weight in module.parameters())

            return hook

        with self._forcing.replica.use() as model, HookSet() as hooks:
            stack = text_stack(model.get_submodule(decoder) if decoder else model)
            layers = [child for child in stack.children() if isinstance(child, torch.nn.ModuleList) and len(child)]
            last = list(layers[-1][-1].children()) if layers else []
            hooks.forward_pre(stack, numbers, name="positions")
            for path, child in model.named_modules():
                if any(child is one for one in last):
                    hooks.forward(child, part(path), name="last layer")
            yield
        if sizes:
            observed["narrow"] = max(sizes, key=lambda path: sizes[path])


def _pattern(view: View) -> torch.Tensor:
    """A mask that is another one in every cell."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, view.n_images, 5, 6, generator=generator, dtype=torch.float32).to(view.device)


def _differentiated(view: View, shortcut: Shortcut | None, steps: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities ``(1, step)`` of ``steps``, and the gradient of their sum to the mask."""
    mask = _pattern(view).requires_grad_(True)
    with torch.enable_grad():
        log_probs = view.masked_pass(mask, shortcut)[:, list(steps)]
        (gradient,) = torch.autograd.grad(log_probs.sum(), mask, allow_unused=True)
        view.passes.add(backward=1)
    return log_probs.detach(), torch.zeros_like(mask) if gradient is None else gradient
