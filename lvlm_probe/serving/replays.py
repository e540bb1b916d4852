"""A replay whose model runs elsewhere: log-probabilities under masks by requests, and nothing from inside the model."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

import torch

from lvlm_probe.errors import ExplainError, MaskError, ReplayError
from lvlm_probe.images import CompositePath
from lvlm_probe.images.masks import expand_masks
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.replaying.micro_batches import Limits
from lvlm_probe.replaying.protocol import Mode, Need, ScoreFunction, Stand
from lvlm_probe.replaying.views import Views
from lvlm_probe.serving.checks import Checks, check_same
from lvlm_probe.serving.forcing import DrawImages, Forcing
from lvlm_probe.serving.messages import ImageFormat
from lvlm_probe.trace.clips import Clip

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.serving.transport import Spent
    from lvlm_probe.trace import Trace


class Host(Protocol):
    """What a replay asks of the server it runs on; see ``Server``."""

    engine: dict[str, Any]
    tell: Callable[[str], object]

    @property
    def spent(self) -> Spent: ...
    @property
    def max_requests(self) -> int | None: ...
    @property
    def at_once(self) -> int: ...

    def cost(self, requests: int, images: Sequence[Image.Image], form: ImageFormat) -> str: ...

    def check_name(self) -> None: ...


class NotOnAServer(ExplainError, AttributeError):
    """Something that takes the model itself was asked of a replay whose model runs elsewhere."""


class _NoShortcuts:
    """A server's passes are whole; what is held while a method runs is that it stays the same model."""

    asked = 0

    def __init__(self, replay: ServedReplay) -> None:
        self._replay, self._inside, self._lock = replay, 0, threading.Lock()

    @contextlib.contextmanager
    def caching(self) -> Iterator[None]:
        """In the block the model does not change: what was answered in it is checked at its end, or, where blocks of
        several threads or methods overlap, at that of the last one."""
        with self._lock:
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                last = not self._inside
        if last:
            self._replay.check()

    def __str__(self) -> str:
        return "none: the server runs whole passes"


class ServedReplay(Views):
    """One recorded answer on a model behind a server. Made by ``lvlm_probe.replay(trace, server)``.

    It has what methods need that look at log-probabilities alone, as ``Replay`` has it. Images are masked here, as real
    8-bit images (``mode="exact"``, always), and the server's own processor sees them.

    Attributes:
        trace, trace_id: what is replayed.
        server: where; ``server.spent`` counts requests.
        tokens, token_ids, special, words: the recorded answer, ``(T,)`` each but ``words``.
        checks: what was found out about the server's numbers when it was opened.
        device: where masks are made: the CPU.
        limits, masks_at_once, recomputes: nothing runs out of memory here.
        shortcuts: what passes leave out: nothing.
    """

    offers: frozenset[Need | Stand] = frozenset({"passes"})
    """What methods may ask of it: log-probabilities; attention rows where the trace holds them."""
    gives, fits = "log-probabilities alone", "rise, occlusion or greedy"
    device = torch.device("cpu")
    recomputes = False

    def __init__(
        self,
        trace: Trace,
        server: Host,
        forcing: Forcing,
        checks: Checks,
        path: CompositePath,
        baseline: Mapping[str, Any],
    ) -> None:
        super().__init__(trace)
        self.server, self.checks, self.path = server, checks, path
        self._forcing, self._baseline = forcing, dict(baseline)
        self.limits = Limits()
        self.kept.original = torch.tensor(checks.original, dtype=torch.float32)
        self.kept.rounding = torch.tensor(checks.noise, dtype=torch.float32)
        self.shortcuts = _NoShortcuts(self)
        if trace.attention is not None:
            self.offers |= {"rows"}

    @property
    def masks_at_once(self) -> int:
        """Requests that may be under way at the same time."""
        return self.server.at_once

    @property
    def origin(self) -> dict[str, Any]:
        """Where its passes are run, for the provenance of what is made of them."""
        engine = dict(self.server.engine)
        return {
            "device": f"the server of {engine['model']!r}",
            "server": {
                **engine,
                "road": self._forcing.road.name,
                "mode": "exact",
                "gives": self._forcing.road.gives,
                "spent": vars(self.server.spent),
            },
        }

    # ------------------------------------------------------------------ what it costs

    def announce(self, what: str, images: Callable[[], int | None], steps: Sequence[int] | None) -> None:
        """Be told, before ``what`` runs, how many images it will send, and of which tokens it wants to know; ``None``
        while these are not chosen, which may send requests itself: of one at least, and nothing is told yet.

        Raises:
            ReplayError: that is more than ``max_requests`` leave.
        """
        number = images()
        if not number:
            return
        needed = number * self._forcing.requests_for(steps)
        limit, spent = self.server.max_requests, self.server.spent.requests
        left = math.inf if limit is None else max(0, limit - spent)
        # Some of them may be in the journal; how many, only their images tell.
        over = needed - len(self._forcing.journal) > left
        if steps is None and not over:
            return
        cost = self.server.cost(needed, self.path.images, self._forcing.form)
        if over:
            least = "at least " if steps is None and not self._forcing.road.every else ""
            raise ReplayError(
                f"{what} sends {least}{cost}, and max_requests={limit} leave {left}: allow "
                f"{least}{spent + needed} (connect(…, max_requests=…); --max-requests or --yes), or ask for less "
                "(masks=… of rise, size=… of occlusion, regions=… of greedy)"
            )
        self.server.tell(f"{what}: {cost}; what has been answered already is not asked again")

    def check(self) -> None:
        """Check that the server still runs the same model, if it was asked for anything since the last time.

        Raises:
            ModelMismatch: it does not; what it answered meanwhile is taken out of the journal.
        """
        if not self._forcing.unchecked:
            return
        try:
            self.server.check_name()
            assert self.kept.original is not None
            check_same(self._forcing, self.path.images, self.kept.original)
        except Exception:
            self._forcing.withdraw()
            raise
        self._forcing.confirmed()

    # ------------------------------------------------------------------ the function

    @property
    def original_log_probs(self) -> torch.Tensor:
        """log P(a_t) on the whole image, ``(step,)`` float32 on the CPU. Paper, Eq. 1."""
        assert self.kept.original is not None
        return self.kept.original.clone()

    def _on_baseline(self) -> torch.Tensor:
        self.passes.add(forward=1)
        return self._forcing.score([lambda: self.path.baseline_images])[0]

    @property
    def rounding(self) -> torch.Tensor:
        """By how much two readings of the whole image differ, ``(step,)`` nats: the server's noise."""
        assert self.kept.rounding is not None
        return self.kept.rounding.clone()

    @outside_modes
    def log_probs(
        self,
        mask: torch.Tensor | None = None,
        *,
        image: int | Clip | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        mode: Mode = "fast",
        micro_batch: int | None = None,
        steps: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """log P(a_t) under masked images, one request per mask (on the next-token road one per mask and token).

        Args:
            mask: as for ``Replay.log_probs``; needs no gradient.
            image: mask this image only and leave the others whole.
            noise, generator: there is none: a server takes images, not pixel inputs.
            mode: real composites, whatever is asked for.
            micro_batch: has no meaning here.
            steps: the tokens that are wanted, by default all; the columns of all others may be NaN.

        Returns:
            ``(batch, step)`` float32, natural log. Paper, Eq. 1 and 3.

        Raises:
            MaskError: wrong shape, type or range.
            ReplayError: the server is not there, or its numbers are not those that were asked for; what it has answered
                is kept.
        """
        if noise:
            self._refuse("noise on pixel inputs")
        if mask is None:
            return self.original_log_probs[None]
        return self._forcing.score(self._drawn(mask, image), None if steps is None else self.wanted(steps))

    def _drawn(self, mask: torch.Tensor, image: int | Clip | None) -> list[DrawImages]:
        """The masked images of each row of the batch, when it is their turn."""
        if not isinstance(mask, torch.Tensor):
            raise MaskError(f"a mask is a floating-point tensor; got {type(mask).__name__}.")
        if mask.requires_grad and torch.is_grad_enabled():
            self._refuse("a gradient to the mask")
        masks = expand_masks(mask[None] if mask.ndim == 2 else mask, self.n_images, image).detach().clamp(0.0, 1.0)
        path = self.path
        self.passes.add(forward=len(masks))
        return [lambda one=one: path.composites(one) for one in masks]  # type: ignore[misc]

    def score_and_grad(
        self,
        mask: torch.Tensor,
        score: ScoreFunction,
        *,
        image: int | Clip | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        micro_batch: int | None = None,
        steps: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """There is no gradient. Raises ``ExplainError``."""
        self._refuse("a gradient to the mask")

    def require_gradients(self) -> None:
        """There are none. Raises ``ExplainError``."""
        self._refuse("gradients")

    def _refuse(self, what: str) -> NoReturn:
        raise NotOnAServer(
            f"{what} cannot be had of {self.origin['device']}, which gives {self.gives}: use {self.fits}, or replay on "
            "the model itself, probe.replay(trace, model, processor)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse(name)

    def __repr__(self) -> str:
        return f"<ServedReplay of {self.trace_id} on {self.server!r}>"


class EstimatedReplay(ServedReplay):
    """One recorded answer on a server that gives less than log-probabilities: of some tokens bounds, or samples.

    Methods that go by log-probabilities are refused; those that stay right with less ask ``between``.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        stand: Stand = "samples" if self._forcing.road.gives == "samples" else "bounds"
        self.offers = (self.offers - {"passes"}) | {stand}
        self.gives = f"{self._forcing.road.name}, {stand} in the place of log-probabilities"
        self.fits = "rise with tokens=…"

    def between(
        self, mask: torch.Tensor, *, image: int | None = None, steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the most that log P(a_t) can be under masked images, ``(batch, step)`` nats each.

        Of samples both are 0 where the token was drawn, and −∞ where not: the mean of exp of either over many draws is
        the probability.

        Args:
            mask, image: as for ``log_probs``.
            steps: the tokens that are wanted; the columns of others are NaN.
        """
        return self._forcing.between(self._drawn(mask, image), self.wanted(steps))

    @property
    def llr(self) -> Any:
        """``None``: a ratio takes two log-probabilities."""
        return None

    def strengthened(self, steps: Sequence[int], *, below: float = 0.05) -> Self:
        """This view: how likely tokens are on a baseline is not known."""
        return self

    def log_probs(self, mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """Those of the whole image, as far as they are known. Raises ``ExplainError`` for any mask."""
        if mask is None:
            return self.original_log_probs[None]
        self._refuse("log-probabilities under masks")
