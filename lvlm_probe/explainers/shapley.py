"""Shapley values: what each player of a game contributes to what all of them reach together.

A coalition S of players has a value v(S); a player's share is (Shapley, 1953)::

    φ_i = Σ_{S ∌ i} |S|! (n − |S| − 1)! / n! · (v(S ∪ i) − v(S))

Shares add up to v(all) − v(none), players who do the same have the same share, and one who does nothing has none. Up to
``EXACT`` players all 2^n coalitions are valued; above, shares are the mean over random orders of the players, each
order and its reverse, with the standard error of that mean (Castro et al., 2009).

Players are parts of what a model is given: stretches of a video (``lvlm_probe.video.which_frames``), images, turns of a
conversation (``lvlm_probe.causal.which_parts``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lvlm_probe.progress import Progress

EXACT = 10
"""Players up to which every coalition is valued: 1,024 of them, about as many as 50 orders and their reverses meet."""

_AT_ONCE = 64

Values = Callable[[np.ndarray], np.ndarray]
"""Coalitions ``(coalition, player)`` bool → their values ``(coalition, score)``, for any number of scores."""


@dataclass(frozen=True)
class Shapley:
    """The shares of one game, or of several that are played at once.

    Attributes:
        shares: ``(player, score)``.
        error: standard error of each, ``(player, score)``; 0 where every coalition was valued.
        everyone, nobody: value of all players and of none, ``(score,)``.
        valued: how many coalitions were valued.
    """

    shares: np.ndarray
    error: np.ndarray
    everyone: np.ndarray
    nobody: np.ndarray
    valued: int


def shapley(
    values: Values, players: int, *, orders: int = 50, seed: int = 0, progress: Progress | None = None
) -> Shapley:
    """Value coalitions, each different one once, and share what they reach.

    Args:
        values: called with at most 64 coalitions.
        players: n.
        orders: of more than ``EXACT`` players, how many random orders are met, each with its reverse; at least 2.
        seed: of the orders.
        progress: called with (done, total) coalitions.
    """
    exact = players <= EXACT
    coalitions = _all(players) if exact else _met(players, orders, np.random.default_rng(seed))
    found, back = np.unique(coalitions.reshape(-1, players), axis=0, return_inverse=True)
    scores = []
    for start in range(0, len(found), _AT_ONCE):
        scores.append(values(found[start : start + _AT_ONCE]))
        if progress is not None:
            progress(min(start + _AT_ONCE, len(found)), len(found))
    v = np.concatenate(scores)[back.reshape(-1)]
    if exact:
        return Shapley(_weighted(v, players), np.zeros((players, v.shape[1])), v[-1], v[0], len(found))
    v = v.reshape(*coalitions.shape[:2], -1)  # (order, place, score)
    place = coalitions.argmax(1)  # (order, player): from which place on each is there
    gained = np.take_along_axis(np.diff(v, axis=1), place[:, :, None] - 1, axis=1)
    means = gained.reshape(orders, 2, players, -1).mean(1)
    return Shapley(means.mean(0), means.std(0, ddof=1) / math.sqrt(orders), v[0, -1], v[0, 0], len(found))


def _all(players: int) -> np.ndarray:
    """All coalitions ``(coalition, player)``: number k has the players whose bits it has."""
    return (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)


def _weighted(v: np.ndarray, players: int) -> np.ndarray:
    numbers, members = np.arange(2**players), _all(players)
    size = members.sum(1)
    weight = [math.factorial(k) * math.factorial(players - k - 1) / math.factorial(players) for k in range(players)]
    shares = np.zeros((players, v.shape[1]))
    for player in range(players):
        without = numbers[~members[:, player]]
        gained = v[without | 1 << player] - v[without]
        shares[player] = np.array(weight)[size[without]] @ gained
    return shares


def _met(players: int, orders: int, generator: np.random.Generator) -> np.ndarray:
    """Coalitions as players come one by one, in random orders and their reverses, ``(order, place, player)``."""
    drawn = [generator.permutation(players) for _ in range(orders)]
    pairs = [each for one in drawn for each in (one, one[::-1])]
    place = np.argsort(pairs, axis=1)  # (order, player): when each comes
    met: np.ndarray = place[:, None, :] < np.arange(players + 1)[None, :, None]
    return met
