"""What explainers and metrics need of a replay: an answer's log-probabilities as a function of a mask.

``Replay`` is one; anything else that has these names can be explained and scored by all methods that mask the image and
look at nothing but log-probabilities, an analytic model for example. Methods that look inside passes (attention, hidden
states) need a ``Replay``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import torch

from lvlm_probe.replaying.baselines import BaselineLike, Path
from lvlm_probe.replaying.micro_batches import Limits, PassCounter
from lvlm_probe.words import Word

if TYPE_CHECKING:
    from PIL import Image

    from lvlm_probe.trace.clips import Clip

Mode = Literal["fast", "exact"]
"""By the traced geometry, or by the real processor on the real composite."""
Need = Literal["passes", "gradients", "attention", "activations"]
"""What a method may need of a replay: log-probabilities under masks, their gradients, what is inside the model."""
Stand = Literal["bounds", "samples", "rows"]
"""What a replay may offer in the place of what a method needs: of passes, bounds on log-probabilities, or samples of
the next token; of attention, rows that were recorded."""
ScoreFunction = Callable[[torch.Tensor], torch.Tensor]
"""Log-probabilities ``(batch, step)`` to scores ``(batch,)``; row i may depend on row i only."""


class ShortcutsLike(Protocol):
    """Parts of passes that are left out when only some tokens are asked for; ``str()`` of it says so."""

    @property
    def asked(self) -> int:
        """Number of calls that have asked for some tokens only."""
        ...

    def caching(self) -> AbstractContextManager[None]:
        """In the block the model does not change, and what is before the image is computed once."""
        ...


class MaskJournal(Protocol):
    """Keeps the log-probabilities that masks gave, by a key: step → nats; a pair where they are bounds on one."""

    def get(self, key: str) -> Mapping[int, float | tuple[float, float]] | None: ...

    def put(self, key: str, values: Mapping[int, float]) -> None: ...


@runtime_checkable
class ReplayLike(Protocol):
    """One answer, as a function of a mask; see ``Replay``, where each of these names is explained."""

    @property
    def trace(self) -> Any: ...
    @property
    def trace_id(self) -> str: ...
    @property
    def tokens(self) -> list[str]: ...
    @property
    def token_ids(self) -> torch.Tensor: ...
    @property
    def special(self) -> torch.Tensor: ...
    @property
    def words(self) -> list[Word]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def path(self) -> Path: ...
    @property
    def passes(self) -> PassCounter: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def masks_at_once(self) -> int: ...
    @property
    def recomputes(self) -> bool: ...
    @property
    def shortcuts(self) -> ShortcutsLike: ...
    @property
    def n_images(self) -> int: ...
    @property
    def image_sizes(self) -> list[tuple[int, int]]: ...
    @property
    def baseline(self) -> dict[str, Any]: ...
    @property
    def original_log_probs(self) -> torch.Tensor: ...
    @property
    def baseline_log_probs(self) -> torch.Tensor: ...
    @property
    def llr(self) -> torch.Tensor: ...
    @property
    def rounding(self) -> torch.Tensor: ...
    @property
    def offers(self) -> frozenset[Need | Stand]: ...
    @property
    def origin(self) -> Mapping[str, Any]: ...

    def announce(self, what: str, images: Callable[[], int | None], steps: Sequence[int] | None) -> None: ...

    def image(self, k: int = 0) -> Image.Image: ...

    def seen(self, k: int = 0, shape: tuple[int, int] | None = None) -> torch.Tensor: ...

    def counted(self) -> Self: ...

    def over(
        self, baseline: BaselineLike = "blur", *, strength: float | None = None, seed: int | None = None
    ) -> Self: ...

    def strengthened(self, steps: Sequence[int], *, below: float = 0.05) -> Self: ...

    def require_gradients(self) -> None: ...

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
    ) -> torch.Tensor: ...

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
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@runtime_checkable
class Estimating(Protocol):
    """A replay that offers a ``Stand``."""

    def between(
        self, mask: torch.Tensor, *, image: int | None = None, steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the most that log P(a_t) can be, ``(batch, step)`` nats each; of samples 0 or −∞, twice."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """A model that is not in this process, in the place of one that is: it replays a trace itself."""

    def replayed(self, trace: Any, *, processor: object | None = None, strict: bool = True) -> ReplayLike:
        """The answer of a trace on this model; see ``lvlm_probe.replay``."""
        ...

    def require_log_probs(self, what: str) -> None:
        """Raise ``ReplayError`` where it gives less of an answer than log-probabilities, which ``what`` takes."""
        ...

    def allowed(self, log_probs: torch.Tensor) -> torch.Tensor:
        """How far two readings of tokens may lie apart by rounding, nats, ``(step,)``."""
        ...
