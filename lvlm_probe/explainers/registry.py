"""What an explainer is given, what it gives back, and how it gets its name.

An explainer is one function::

    @register("occlusion")
    def occlusion(problem: Problem, *, size: int = 8) -> Outcome: ...

Its keyword-only parameters are what ``explain(replay, method="occlusion", size=4)`` takes. It talks to the model
through ``problem.replay`` only, so it runs on every model that can be replayed. ``needs`` says what it takes to run it:

* ``"passes"``: forward passes of the model under masks; the default.
* ``"gradients"``: backward passes too.
* ``"attention"``: the decoder's (or the encoder's) attention weights.
* ``"activations"``: outputs of modules inside the model.

A method that needs neither passes nor gradients can be run on a trace alone, without its model (``problem.live`` is
False then), where the trace holds what it needs.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

import torch

from lvlm_probe.errors import ExplainError
from lvlm_probe.plugins import check_registration

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace import Trace

__all__ = ["Explainer", "Need", "Outcome", "Problem", "check_parameters", "find", "names", "needs_of", "register"]

Need = Literal["passes", "gradients", "attention", "activations"]

Progress = Callable[[int, int], None]
"""Called with (done, total) in the explainer's own unit."""


@dataclass(frozen=True)
class Problem:
    """What is to be explained: the answer's tokens ``selection`` by picture ``image`` of ``replay``.

    ``live`` is False where a trace alone is explained; ``replay`` then is that trace and runs no pass.
    """

    replay: Replay
    selection: TokenSelection
    image: int = 0
    seed: int = 0
    progress: Progress | None = None
    live: bool = True

    @property
    def trace(self) -> Trace:
        """The recording, where what was recorded is read."""
        return self.replay.trace  # type: ignore[return-value]

    @property
    def queries(self) -> torch.Tensor:
        """Positions of the teacher-forced sequence at which the selected tokens are predicted, ``(token,)`` int64.

        Token t of the answer is predicted at P + t − 1, P being the number of prompt tokens.
        """
        return torch.tensor(self.selection.indices) + (len(self.trace.input_ids) - 1)

    def score(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Cumulative log-likelihood of the selected tokens, ``(batch, step)`` → ``(batch,)``, nats. Paper, Eq. 7."""
        return log_probs[:, list(self.selection.indices)].sum(dim=1)

    def generator(self, offset: int = 0) -> torch.Generator:
        """Random numbers of this explanation alone: the same seed gives the same ones, whatever ran before."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + offset) % 2**63)

    def grid(self, size: int | Sequence[int] | None, *, cells: int = 256) -> tuple[int, int]:
        """Mask size ``(row, col)``: ``n`` is n × n, ``None`` about ``cells`` cells as square as the picture allows."""
        if size is None:
            width, height = self.replay.image_sizes[self.image]
            rows = max(1, round((cells * height / width) ** 0.5))
            return rows, max(1, round(cells / rows))
        pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2 or not all(isinstance(edge, int) and edge >= 1 for edge in pair):
            raise ExplainError(f"size is a number of cells or (rows, columns), both at least 1; got {size!r}")
        return pair[0], pair[1]

    def seen(self, shape: tuple[int, int]) -> torch.Tensor:
        """Which cells of a ``(row, col)`` grid on the picture the model sees, bool, on the CPU."""
        return self.replay.seen(self.image, shape).cpu()

    def advance(self, done: int, total: int) -> None:
        """Tells the caller how far the work is."""
        if self.progress is not None:
            self.progress(done, total)


@dataclass(frozen=True)
class Outcome:
    """An explainer's answer.

    Attributes:
        values: Importance ``(row, col)`` over the original picture, in [0, 1], high = important, or ``None``.
        params: The parameters as they were used, defaults included, JSON-ready.
        history: One record per iteration, for methods that iterate.
        diagnostics: What tells how far to trust the values: an error bar, a completeness error; JSON-ready. It is kept
            in the heatmap's provenance.
        reason: Why there are no values, as a sentence.
    """

    values: torch.Tensor | None
    params: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    reason: str | None = None
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


class Explainer(Protocol):
    """The signature of a registered method; its parameters are keyword-only."""

    def __call__(self, problem: Problem, /, **params: Any) -> Outcome: ...


_Function = TypeVar("_Function", bound=Callable[..., Outcome])
_METHODS: dict[str, Callable[..., Outcome]] = {}
_NEEDS: dict[str, frozenset[Need]] = {}


def register(name: str, *, needs: Sequence[Need] = ("passes",)) -> Callable[[_Function], _Function]:
    """Registers a function ``(problem, *, …) -> Outcome`` as an explainer under a name.

    Args:
        name: What ``explain(..., method=name)`` is given.
        needs: What it takes to run it, see the module.

    Raises:
        ExplainError: Another function holds the name, ``needs`` has an unknown word, or what is registered is no
            function of a problem under a name.
    """
    check_registration("an explainer", name, register, ExplainError)
    try:
        unknown = sorted(map(str, set(needs) - set(get_args(Need))))
    except TypeError:
        raise ExplainError(f"needs of {name!r} is a list of words, not {needs!r}") from None
    if unknown:
        raise ExplainError(f"needs of {name!r}: {unknown[0]!r} is not one of {', '.join(map(repr, get_args(Need)))}")

    def decorate(function: _Function) -> _Function:
        check_registration("an explainer", name, function, ExplainError)
        try:
            inspect.signature(function).bind_partial(None)
        except TypeError:
            raise ExplainError(
                f"{_home(function)} is no explainer: it takes no problem as its first argument"
            ) from None
        except ValueError:
            pass  # written in C, and does not say
        holder = _METHODS.get(name)
        if holder is not None and _home(holder) != _home(function):
            raise ExplainError(
                f"the name {name!r} is taken by {_home(holder)}; register {_home(function)} under another one"
            )
        _METHODS[name], _NEEDS[name] = function, frozenset(needs)
        return function

    return decorate


def _home(function: Callable[..., Any]) -> str:
    """Where a function is from; an object that can be called has no name of its own, but its class has."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def names() -> list[str]:
    """Names registered so far, sorted."""
    return sorted(_METHODS)


def needs_of(name: str) -> frozenset[Need]:
    """What it takes to run a registered method. Raises ``ExplainError`` for an unknown one."""
    find(name)
    return _NEEDS[name]


def find(name: str) -> Callable[..., Outcome]:
    """The explainer registered under a name. Raises ``ExplainError`` that lists all methods, closest first."""
    try:
        return _METHODS[name]
    except KeyError:
        raise ExplainError(f"no explainer {name!r}{_closest(name, _METHODS)}") from None


def check_parameters(name: str, known: Sequence[str] | Callable[..., Outcome], params: Mapping[str, Any]) -> None:
    """Raises ``ExplainError`` when a method does not take one of the parameters; names the closest it does take.

    ``known`` is their names, or the method itself; one that takes any (``**settings``) checks for itself.
    """
    if callable(known):
        try:
            signature = inspect.signature(known).parameters.values()
        except (TypeError, ValueError):  # written in C: it checks for itself
            return
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature):
            return
        known = [parameter.name for parameter in signature if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for parameter in params:
        if parameter not in known:
            raise ExplainError(f"{name} takes no parameter {parameter!r}{_closest(parameter, known)}")


def _closest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    ordered = sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))
    return f"; there are (closest first): {', '.join(map(repr, ordered))}" if ordered else ""
