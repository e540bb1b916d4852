"""Gives jobs to workers, and jobs of lost workers to others.

Where workers run, that they are started again on a machine with room when their process or machine is lost (Ray's
``max_restarts``), how many fit beside each other, and how data gets there is Ray's affair. What is left is here: the
next job to whoever is free. Calls of lost workers are not repeated by Ray itself (``max_task_retries``): such a call
waits until its own worker is back, which never happens where a machine is gone and the others are full, while the job
could long be done elsewhere. ``ray.util.ActorPool`` does not tell which job a lost worker had.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from lvlm_probe.errors import ProbeWarning, StudyError
from lvlm_probe_ray.jobs import About, Job, Lost, Outcome, Task

__all__ = ["Pool"]

_PAUSE = 2.0
"""Seconds between questions whether a worker that was lost is there again."""
_PATIENCE = 60.0
"""Seconds without any worker after which the person is told what is waited for."""


@dataclass(eq=False)
class _Seat:
    """One worker, over all its processes: ``about`` is the present one, ``None`` while there is none."""

    actor: Any
    about: About | None = None
    job: Job | None = None


class Pool:
    """Workers that jobs are given to.

    Args:
        make: Starts one worker.
        workers: How many.
        minimum: Give out nothing before so many are up for the first time.
        attempts: Workers that one job may lose.
        describe: What a worker needs, for messages.
    """

    def __init__(
        self, make: Callable[[], Any], *, workers: int, minimum: int = 1, attempts: int = 3, describe: str = ""
    ) -> None:
        self._attempts = attempts
        self._minimum = min(minimum, workers)
        self._describe = describe
        self._seats = [_Seat(make()) for _ in range(workers)]
        self._asked: dict[Any, _Seat] = {seat.actor.about.remote(): seat for seat in self._seats}
        self._busy: dict[Any, _Seat] = {}
        self._away: list[_Seat] = []
        self._ask_again = 0.0
        self._begun = False
        self._losses_in_a_row = 0
        self._reason = ""
        self._quiet_since = time.monotonic()

    def run(
        self, jobs: Iterable[Job], pack: Callable[[Job, About], Task]
    ) -> Iterator[tuple[Job, Outcome | Lost, About]]:
        """Does jobs, in any order, and yields what comes of each once.

        Args:
            jobs: Read as workers become free.
            pack: Makes what a worker is sent of a job.

        Raises:
            StudyError: no worker is left, or all are lost again and again.
        """
        coming, waiting = iter(jobs), deque[Job]()
        self._quiet_since = time.monotonic()
        while True:
            self._hand_out(coming, waiting, pack)
            if not self._busy and not waiting:
                job = next(coming, None)
                if job is None:
                    return
                waiting.append(job)
            yield from self._wait(waiting)

    def close(self) -> None:
        """Ends all workers, whatever they do."""
        for seat in self._seats:
            ray.kill(seat.actor)
        self._seats.clear()

    def _hand_out(self, coming: Iterator[Job], waiting: deque[Job], pack: Callable[[Job, About], Task]) -> None:
        up = [seat for seat in self._seats if seat.about is not None]
        self._begun = self._begun or len(up) >= min(self._minimum, len(self._seats))
        if not self._begun:
            return
        for seat in up:
            if seat.job is None and seat.about is not None:
                job = waiting.popleft() if waiting else next(coming, None)
                if job is None:
                    return
                seat.job = job
                self._busy[seat.actor.work.remote(pack(job, seat.about))] = seat

    def _wait(self, waiting: deque[Job]) -> Iterator[tuple[Job, Outcome | Lost, About]]:
        """Waits until something happens, a few seconds at most."""
        if not self._seats:
            raise StudyError(f"no worker is left: {self._reason}")
        if self._away and time.monotonic() >= self._ask_again:
            self._asked |= {seat.actor.about.remote(): seat for seat in self._away}
            self._away.clear()
        refs, timeout = [*self._busy, *self._asked], _PAUSE if self._away else _PATIENCE
        if not refs:
            time.sleep(timeout)
            return
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        if not any(seat.about for seat in self._seats):
            self._tell_of_waiting()
        for ref in ready:
            if ref in self._asked:
                self._greet(ref, self._asked.pop(ref))
            else:
                yield from self._receive(ref, self._busy.pop(ref), waiting)

    def _greet(self, ref: Any, seat: _Seat) -> None:
        """A worker is up, still away, or gone for good."""
        try:
            seat.about = ray.get(ref)
        except (RayTaskError, ActorDiedError) as error:
            self._drop(seat, _sentence(error))
        except RayError:
            self._miss(seat)

    def _receive(self, ref: Any, seat: _Seat, waiting: deque[Job]) -> Iterator[tuple[Job, Outcome | Lost, About]]:
        job, about = seat.job, seat.about
        assert job is not None and about is not None
        seat.job = None
        try:
            outcome = ray.get(ref)
        except RayTaskError as error:
            outcome = Outcome(trouble=_sentence(error))
        except RayError as error:
            yield from self._lose(seat, job, about, error, waiting)
            return
        if outcome.trouble is not None:
            waiting.appendleft(job)
            self._drop(seat, outcome.trouble)
            return
        self._losses_in_a_row = 0
        yield job, outcome, about

    def _lose(
        self, seat: _Seat, job: Job, about: About, error: RayError, waiting: deque[Job]
    ) -> Iterator[tuple[Job, Outcome | Lost, About]]:
        reason = f"the worker on {about.host} (process {about.pid}) was lost: {_sentence(error)}"
        self._losses_in_a_row += 1
        self._miss(seat)
        # More in a row than a few bad units explain; one that every worker dies of is over after `attempts`.
        if self._losses_in_a_row > 4 * self._attempts * len(self._seats):
            raise StudyError(
                f"{self._losses_in_a_row} workers in a row were lost, none of them with a result: {reason}"
            )
        if job.attempt >= self._attempts:
            for part in job.again():
                yield part, Lost(f"{self._attempts} workers were lost with it; the last: {reason}"), about
            return
        _warn(f"{reason}; {job}: given to another one")
        waiting.extendleft(reversed(job.again()))

    def _miss(self, seat: _Seat) -> None:
        """Ray starts it again; it is asked from time to time whether it is there."""
        seat.about = None
        self._away.append(seat)
        self._ask_again = time.monotonic() + _PAUSE

    def _drop(self, seat: _Seat, reason: str) -> None:
        self._reason = reason
        self._seats.remove(seat)
        ray.kill(seat.actor)
        if self._seats:
            _warn(f"one worker less, {len(self._seats)} left: {reason}")

    def _tell_of_waiting(self) -> None:
        if time.monotonic() - self._quiet_since >= _PATIENCE:
            self._quiet_since = float("inf")
            free = ", ".join(f"{name} {ray.available_resources().get(name, 0):g}" for name in ("CPU", "GPU"))
            _warn(f"no worker is up yet; each needs {self._describe}, and the cluster has free {free}")


def _sentence(error: RayError) -> str:
    """What Ray says, in one line, and what to do where that is known."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, RayTaskError):
        text = f"{type(error.cause).__name__}: {error.cause}".partition("\n")[0]
    elif isinstance(error, RayActorError) and len(lines) > 1 and "__init__" in str(error):
        text = lines[-1]  # it could not be set up: the last line of the traceback says why
    else:
        text = " ".join(lines)[:300] or type(error).__name__
    if "No module named" in text:
        text += "; lvlm-probe, lvlm-probe-ray and what the study uses must be installed on every machine"
    return text


def _warn(sentence: str) -> None:
    warnings.warn(sentence, ProbeWarning, stacklevel=2)
