"""What an explainer is given, what it gives back, and how it gets its name.

An explainer is one function::

    @register("occlusion")
    def occlusion(problem: Problem, *, size: int = 8) -> Outcome: ...

Its keyword-only parameters are what ``explain(replay, method="occlusion", size=4)`` takes. It talks to the model
through ``problem.replay`` only, so it runs on every model that can be replayed. A built-in method is one file of this
folder, found by being there: its module's first sentence is what ``lvlm-probe methods`` prints, ``cost`` what ``plan``
reckons with, and a row of ``docs/methods.md`` says the rest. ``needs`` says what it takes to run it:

* ``"passes"``: forward passes of the model under masks; the default.
* ``"gradients"``: backward passes too.
* ``"attention"``: the decoder's (or the encoder's) attention weights.
* ``"activations"``: outputs of modules inside the model.

``takes`` says what it stays right with where that cannot be had: for log-probabilities ``"bounds"`` on them, or
``"samples"`` of the next token (``replaying.protocol.Estimating``); for attention, recorded ``"rows"``. The default is
nothing.

A method that needs neither passes nor gradients can be run on a trace alone, without its model (``problem.live`` is
False then), where the trace holds what it needs.
"""

from __future__ import annotations

import difflib
import html
import importlib
import inspect
import operator
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch

from lvlm_probe.errors import ExplainError, ProbeError
from lvlm_probe.kinds import is_whole, plain_number, told_by_kind, wrong_kind
from lvlm_probe.models.inputs import index_on
from lvlm_probe.plugins import check_registration, load_plugins
from lvlm_probe.progress import Progress
from lvlm_probe.replaying.protocol import Need, Stand
from lvlm_probe.trace.clips import images_of

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace import Trace
    from lvlm_probe.trace.clips import Clip

Shape = tuple[int, ...]
"""Cells of a mask: ``(row, col)``, of a clip ``(t, row, col)``."""

_FINE = 1 << 16
"""Cells that a mask may have on any image, however small."""

MOST_STEPS = 16
"""Steps in time of a clip's mask by default; a step of a longer clip lasts several frames."""


@dataclass(frozen=True)
class Problem:
    """What is to be explained: the answer's tokens ``selection`` by image ``image`` of ``replay``, or by a ``clip``,
    whose first frame that image then is. Methods that are registered with ``clips`` ask for ``shape`` in place of
    ``grid``, and mask ``target``, with ``even`` masks where they mask no place; no others are given one.

    ``live`` is False where a trace alone is explained; ``replay`` then is that trace and runs no pass.

    Where ``replay`` searches in a smaller number format, ``exact`` is the same replay in the model's own.
    """

    replay: Replay
    selection: TokenSelection
    image: int = 0
    seed: int = 0
    progress: Progress | None = None
    live: bool = True
    clip: Clip | None = None
    exact: Replay | None = None

    @property
    def trace(self) -> Trace:
        """The recording, where what was recorded is read."""
        return self.replay.trace  # type: ignore[return-value]

    @property
    def measuring(self) -> Replay:
        """The replay by whose passes maps are compared and reported on, in the model's own number format."""
        return self.replay if self.exact is None else self.exact

    def searched_in(self, dtype: str | None) -> Problem:
        """The same, where the method searches in the number format ``dtype`` (``Replay.computed_in``) and measures as
        before; ``None`` leaves all as it is. Raises ``ExplainError`` as that does."""
        if dtype is None:
            return self
        return replace(self, replay=self.replay.computed_in(dtype), exact=self.measuring)

    @contextmanager
    def caching(self) -> Iterator[None]:
        """In the block the model does not change: its passes, to search and to measure, share what they can."""
        with self.measuring.shortcuts.caching(), self.replay.shortcuts.caching():
            yield

    @property
    def queries(self) -> torch.Tensor:
        """Positions of the teacher-forced sequence at which the scored tokens are predicted, ``(token,)`` int64: the
        selected ones', and those that a score of the user's own reads besides.

        Token t of the answer is predicted at P + t − 1, P being the number of prompt tokens.
        """
        own = self.selection.score
        read = self.selection.indices if own is None else own.read(len(self.selection.tokens))
        return torch.tensor(read) + (len(self.trace.input_ids) - 1)

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of log-probabilities that are scored, as ``steps=`` of the replay: the selected tokens', or the one
        that a score of the user's own has."""
        return self.selection.columns

    def score(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Cumulative log-likelihood of the selected tokens, ``(batch, step)`` → ``(batch,)``, nats (paper, Eq. 7); or
        the score that the selection has in its place."""
        return self.chosen(log_probs).sum(dim=1)

    def chosen(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Those of the selected tokens, ``(batch, step)`` → ``(batch, token)``; or that score, ``(batch, 1)``."""
        return log_probs.index_select(1, index_on(log_probs.device, tuple(map(int, self.columns))))

    def generator(self, offset: int = 0) -> torch.Generator:
        """Random numbers of this explanation alone: the same seed gives the same ones, whatever ran before."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + offset) % 2**63)

    @property
    def target(self) -> int | Clip:
        """What a mask is laid over, as ``image=`` of the replay: the clip where there is one, else the image."""
        return self.image if self.clip is None else self.clip

    @property
    def images(self) -> range:
        """Numbers of the images that are explained: one, or the frames of the clip."""
        return images_of(self.target)

    @property
    def extent(self) -> tuple[int, ...]:
        """``(width, height)`` of the image, pixels; of a clip ``(width, height, frames)``."""
        size = self.replay.image_sizes[self.image]
        return size if self.clip is None else (*size, self.clip.frames)

    def even(self, values: torch.Tensor) -> torch.Tensor:
        """Masks of one cell, ``(batch,)`` → ``(batch, 1, 1)``, of a clip ``(batch, 1, 1, 1)``."""
        return values.reshape(-1, *[1] * len(self.extent))

    @property
    def whole(self) -> torch.Tensor:
        """The mask that shows all of it: one cell, ``(1, 1, 1)``, of a clip ``(1, 1, 1, 1)``."""
        return self.even(torch.ones(1, dtype=torch.float32))

    def shape(self, size: int | Sequence[int] | None, *, cells: int = 256) -> Shape:
        """Mask size: ``grid``'s, and of a clip ``(t, row, col)``: a step in time for each frame, at most
        ``MOST_STEPS``, unless ``size`` is three numbers.
        """
        if self.clip is None:
            return self.grid(size, cells=cells)
        if isinstance(size, (tuple, list)) and len(size) == 3:
            steps, size = size[0], tuple(size[1:])
            if not is_whole(steps) or int(steps) < 1:
                raise ExplainError(f"a clip's mask has at least one step in time; got {steps!r}")
        else:
            steps = min(self.clip.frames, MOST_STEPS)
        return int(steps), *self.grid(size, cells=cells)

    def grid(self, size: int | Sequence[int] | None, *, cells: int = 256) -> tuple[int, int]:
        """Mask size ``(row, col)``: ``n`` is n × n, ``None`` about ``cells`` cells as square as the image allows."""
        if size is None:
            width, height = self.replay.image_sizes[self.image]
            rows = max(1, round((cells * height / width) ** 0.5))
            return rows, max(1, round(cells / rows))
        pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2 or not all(is_whole(edge) and int(edge) >= 1 for edge in pair):
            raise ExplainError(f"size is a number of cells or (rows, columns), both at least 1; got {size!r}")
        rows, columns = map(int, pair)
        width, height = self.replay.image_sizes[self.image]
        if rows * columns > max(width * height, _FINE):
            raise ExplainError(
                f"size={size!r} is {rows} x {columns} cells, more than the {width} x {height} pixels of the image; "
                "None is about 256 cells"
            )
        return rows, columns

    def seen(self, shape: Shape) -> torch.Tensor:
        """Which cells of a grid on the image, or of tubes in the clip, the model sees, bool, on the CPU."""
        if self.clip is None:
            return self.replay.seen(self.image, (shape[0], shape[1])).cpu()
        grids = [self.replay.seen(k, (shape[1], shape[2])).cpu() for k in self.clip.images]
        return torch.stack(
            [torch.stack([grids[frame] for frame in part]).any(dim=0) for part in self.clip.parts(shape[0])]
        )

    def advance(self, done: int, total: int) -> None:
        """Tells the caller how far the work is."""
        if self.progress is not None:
            self.progress(done, total)


@dataclass(frozen=True)
class Outcome:
    """An explainer's answer.

    Attributes:
        values: Importance ``(row, col)`` over the original image, in [0, 1], high = important, or ``None``.
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


Kind = Literal["forward", "gradient", "relevance", "rollout", "rows", "activations", "hidden"]
"""What a method does with a pass: nothing more; a backward pass; attention with its gradients, layer by layer, or
attention alone, for all positions or for the answer's; outputs of the encoder's blocks with their gradients; final
hidden states."""


@dataclass(frozen=True)
class Cost:
    """What a method asks of the model; ``plan`` turns it into bytes and seconds by what it measures.

    Attributes:
        kind: what it does with a pass; ``None`` where it runs none.
        forward, backward: images through the model, at most; ``None`` where that is not known.
        groups: numbers of masks that it hands over at once.
        splits: whether they may go through in smaller micro-batches.
        noise: deviation of the noise on pixels.
        numbers: numbers in single precision that it keeps itself while a pass runs.
        about: the passes depend on the image; the figures are an estimate.
        parts: whose attention it reads.
        grids: sizes of the masks it sends, ``(row, col)`` or, of a clip, ``(t, row, col)``.
        drawn: the finest of further sizes, which are not known before it runs; ``None`` where there are none.
        queries: of how many of the answer's positions it reads attention rows; by default of all.
        joined: of attention and its gradients it multiplies means over the masks, not those of every mask.
        general: another question that it asks, and the question in whose place; ``None`` where it asks none.
        at_least: forward and backward where the method may stop early; ``None`` where it does not.
        beside: seconds of its own, beside the passes, by a processor core of 2020 or so; a guess.
    """

    kind: Kind | None
    forward: int | None = None
    backward: int | None = None
    groups: tuple[int, ...] = (1,)
    splits: bool = True
    noise: float = 0.0
    numbers: int = 0
    about: bool = False
    parts: tuple[Any, ...] = ("decoder",)
    grids: tuple[Shape, ...] = ((1, 1),)
    drawn: Shape | None = None
    queries: int | None = None
    joined: bool = False
    general: tuple[str, str | None] | None = None
    at_least: tuple[int, int] | None = None
    beside: float = 0.0


CostRule = Callable[["Problem", Mapping[str, Any]], Cost]
"""The cost of a method on a problem (its image; no selection yet) with all its parameters, defaults included."""


@dataclass(frozen=True)
class Method:
    """A registered explainer, what it takes to run it, and how its cost is found."""

    function: Callable[..., Outcome]
    needs: frozenset[Need]
    cost: CostRule | None = None
    clips: bool = False
    takes: frozenset[Stand] = frozenset()


_Function = TypeVar("_Function", bound=Callable[..., Outcome])
METHODS: dict[str, Method] = {}
"""Name → method, as far as registered."""


def register(
    name: str,
    *,
    needs: Sequence[Need] = ("passes",),
    cost: CostRule | None = None,
    clips: bool = False,
    takes: Sequence[Stand] = (),
) -> Callable[[_Function], _Function]:
    """Registers a function ``(problem, *, …) -> Outcome`` as an explainer under a name.

    Args:
        name: what ``explain(..., method=name)`` is given.
        needs: what it takes to run it, see the module.
        cost: what it asks of the model, for ``plan``; without it a plan goes by ``needs`` alone, and the number of
            passes is not known.
        clips: it takes a problem of a clip too, whose masks and values have an axis of time in front.
        takes: in the place of what it needs, see the module.

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
        holder = METHODS.get(name)
        if holder is not None and _home(holder.function) != _home(function):
            raise ExplainError(
                f"the name {name!r} is taken by {_home(holder.function)}; register {_home(function)} under another one"
            )
        METHODS[name] = Method(function, frozenset(needs), cost, clips, frozenset(takes))
        return function

    return decorate


def _home(function: Callable[..., Any]) -> str:
    """Where a function is from; an object that can be called has no name of its own, but its class has."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def discover(folder: Sequence[str], package: str) -> None:
    """Import every module of a package's folder, which registers the methods in it."""
    for module in pkgutil.iter_modules(folder):
        importlib.import_module(f"{package}.{module.name}")


def names() -> list[str]:
    """Names registered so far, sorted."""
    return sorted(METHODS)


class MethodNames(list[str]):
    """Names of methods: a list, which shows itself with what each of them does."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {summary_of(name)}" for name in self)

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td><b>{html.escape(name)}</b></td><td>{html.escape(summary_of(name))}</td></tr>" for name in self
        )
        return f"<table>{''.join(rows)}</table>"


def methods() -> MethodNames:
    """Return the names of all explainers, those of installed plugins included; shown with what each of them does."""
    load_plugins()
    return MethodNames(names())


def summary_of(name: str) -> str:
    """Return the first sentence of a method's documentation. Raises ``ExplainError`` for an unknown one.

    Our own modules say at the top what their method is, and the function what it takes; where several methods share a
    module, each function says it, unless it points to the module.
    """
    function = resolve(name)
    own = inspect.getdoc(function) or ""
    home = str(getattr(function, "__module__", ""))
    module = sys.modules.get(home)
    alone = sum(getattr(item.function, "__module__", "") == home for item in METHODS.values()) == 1
    ours = home.startswith("lvlm_probe.")
    if ours and (alone or "module's docstring" in own.split("\n\n")[0]):
        own = inspect.getdoc(module) or own
    paragraph = own.split("\n\n")[0].replace("\n", " ").replace("``", "").strip()
    # Not at "Eq. 2" or "et al. (2021)": a sentence goes on with a capital.
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0] or "(no description)"


def resolve(name: str) -> Callable[..., Outcome]:
    """The explainer of a name, those of installed plugins included. Raises ``ExplainError`` that lists all methods,
    closest first."""
    return _method(name).function


def needs_of(name: str) -> frozenset[Need]:
    """What it takes to run a registered method. Raises ``ExplainError`` for an unknown one."""
    return _method(name).needs


def follows_score(name: str) -> bool:
    """Tell whether a registered method explains a score, whichever: those do that differentiate it or look at masked
    images alone, not those that read what they find inside a pass. Raises ``ExplainError`` for an unknown one."""
    needs = _method(name).needs
    return "gradients" in needs or not needs & {"attention", "activations"}


def stands_for(name: str) -> frozenset[Stand]:
    """What a registered method takes in the place of what it needs. Raises ``ExplainError`` for an unknown one."""
    return _method(name).takes


def cost_of(method: str, problem: Problem, params: Mapping[str, Any]) -> Cost:
    """What a registered method asks of the model with these parameters. Raises ``ExplainError`` for an unknown one, and
    for parameters from which no number of passes follows.

    Of a method that declares no cost the number of passes is not known.
    """
    function = resolve(method)
    rule, needs = METHODS[method].cost, METHODS[method].needs
    if rule is not None:
        parameters = inspect.signature(function).parameters.values()
        defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
        params = {name: plain_number(value) for name, value in params.items()}
        try:
            with told_by_kind(method, function, params):
                cost = rule(problem, {**defaults, **params})
                _check_numbers(cost)
                return cost
        except (ZeroDivisionError, ValueError) as error:
            numbers = {name: value for name, value in params.items() if isinstance(value, int | float)}
            low = " and ".join(f"{name}={value}" for name, value in numbers.items() if not value >= 1)
            if isinstance(error, ProbeError) or not low:
                raise
            raise ExplainError(f"{method}: {low} is too little; give at least 1") from error
    if "gradients" in needs:
        kind: Kind = "relevance" if "attention" in needs else "activations" if "activations" in needs else "gradient"
        return Cost(kind)
    if "attention" in needs:
        return Cost("rollout")
    return Cost("hidden" if "activations" in needs else "forward" if "passes" in needs else None)


def _check_numbers(cost: Cost) -> None:
    """Raises ``ValueError`` or ``TypeError`` where a rule counted no number of masks, or names no question."""
    if any(operator.index(group) < 1 for group in cost.groups):
        raise ValueError(f"masks at once: {cost.groups}")
    if not all(number is None or number >= 0 for number in (cost.forward, cost.backward)):
        raise ValueError(f"images: {cost.forward} forward, {cost.backward} backward")
    for text in cost.general or ():
        if not isinstance(text, str | None):
            raise TypeError(f"{text!r} is no question")


def _method(name: str) -> Method:
    if not isinstance(name, str):
        raise ExplainError(f"a method is named by a text, such as 'igos++'; got {name!r:.80}")
    # Plugins are looked for only when a name is not our own: importing them may take long.
    if name not in METHODS:
        load_plugins()
    try:
        return METHODS[name]
    except KeyError:
        raise ExplainError(f"no explainer {name!r}{_closest(name, METHODS)}") from None


def batches(total: int, batch: int) -> tuple[int, ...]:
    """Sizes of the groups that ``total`` masks go through in, ``batch`` at a time, for ``Cost.groups``."""
    return tuple(sorted({min(batch, total), total % batch or batch}))


_AT_ONCE = {"bool": bool, "float": float}
"""Annotations of parameters that hold no text: one is true whatever it says, and compares with no number."""


def check_parameters(name: str, known: Sequence[str] | Callable[..., Outcome], params: Mapping[str, Any]) -> None:
    """Raises ``ExplainError`` when a method does not take one of the parameters, and names the closest it does take; or
    where one is no number or no bool that has to be.

    ``known`` is their names, or the method itself; one that takes any (``**settings``) checks for itself.
    """
    if callable(known):
        try:
            signature = inspect.signature(known).parameters.values()
        except (TypeError, ValueError):  # written in C: it checks for itself
            return
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature):
            return
        named = {one.name: one.annotation for one in signature if one.kind is inspect.Parameter.KEYWORD_ONLY}
        known = list(named)
        for parameter in sorted(params.keys() & named.keys()):
            kind, value = _AT_ONCE.get(str(getattr(named[parameter], "__name__", named[parameter]))), params[parameter]
            if kind and (value is None or isinstance(value, str | Mapping | Sequence)):
                raise wrong_kind(name, parameter, kind, value)
    for parameter in params:
        if parameter not in known:
            raise ExplainError(f"{name} takes no parameter {parameter!r}{_closest(parameter, known)}")


def _closest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    ordered = sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))
    return f"; there are (closest first): {', '.join(map(repr, ordered))}" if ordered else ""
