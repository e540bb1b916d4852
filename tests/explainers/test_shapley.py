"""Shapley values against their definition: the mean over all orders, and the axioms that no other division meets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lvlm_probe.explainers.shapley import EXACT, shapley


def a_game(players: int, scores: int = 2, seed: int = 0) -> np.ndarray:
    """Any values of all coalitions, ``(coalition, score)``: number k has the players whose bits it has."""
    return np.random.default_rng(seed).normal(size=(2**players, scores))


def played(table: np.ndarray, met: list[int] | None = None):
    """The game as a function of coalitions, which keeps how many it was asked for."""

    def values(coalitions: np.ndarray) -> np.ndarray:
        assert coalitions.dtype == bool
        if met is not None:
            met.append(len(coalitions))
        return table[coalitions @ (1 << np.arange(coalitions.shape[1]))]

    return values


def by_permutations(table: np.ndarray, players: int) -> np.ndarray:
    shares = np.zeros((players, table.shape[1]))
    for order in itertools.permutations(range(players)):
        there = 0
        for player in order:
            shares[player] += table[there | 1 << player] - table[there]
            there |= 1 << player
    return shares / math.factorial(players)


@pytest.mark.quick
@pytest.mark.parametrize("players", [1, 2, 3, 6])
def test_exact_shares_are_the_mean_over_all_orders(players: int) -> None:
    table, met = a_game(players), []
    found = shapley(played(table, met), players)
    np.testing.assert_allclose(found.shares, by_permutations(table, players), atol=1e-12)
    assert not found.error.any()
    assert sum(met) == found.valued == 2**players and max(met) <= 64
    np.testing.assert_array_equal(found.everyone - found.nobody, table[-1] - table[0])


def test_axioms() -> None:
    """Efficiency; a player who adds nothing has nothing; two who do the same have the same; games add up."""
    players, table = 5, a_game(5)
    numbers = np.arange(32)
    table = table[numbers & ~0b00100]  # player 2 adds nothing, whoever is there
    swapped = (numbers & ~0b11) | (numbers & 1) << 1 | (numbers & 2) >> 1
    table = (table + table[swapped]) / 2  # players 0 and 1 do the same
    found = shapley(played(table), players).shares
    np.testing.assert_allclose(found.sum(0), table[-1] - table[0], atol=1e-12)
    np.testing.assert_allclose(found[2], 0, atol=1e-12)
    np.testing.assert_allclose(found[0], found[1], atol=1e-12)
    other = a_game(5, seed=1)
    both = shapley(played(table + other), players).shares
    np.testing.assert_allclose(both, found + shapley(played(other), players).shares, atol=1e-12)


def test_more_players_are_sampled_with_an_error_that_holds() -> None:
    players = EXACT + 1
    weights = np.random.default_rng(0).random(players)

    def values(coalitions: np.ndarray) -> np.ndarray:
        return np.log1p(coalitions @ weights)[:, None]

    every = np.arange(2**players)
    table = values((every[:, None] >> np.arange(players) & 1).astype(bool))
    size = np.array([bin(number).count("1") for number in every])
    truth = np.zeros(players)
    for player in range(players):
        without = every[(every >> player & 1) == 0]
        gained = (table[without | 1 << player] - table[without])[:, 0]
        truth[player] = np.mean([gained[size[without] == k].mean() for k in range(players)])
    found = shapley(values, players, orders=60, seed=1)
    assert found.valued < 2 * 60 * players
    assert (found.error > 0).all()
    assert np.abs((found.shares[:, 0] - truth) / found.error[:, 0]).max() < 5
    np.testing.assert_allclose(found.shares.sum(0), found.everyone - found.nobody, atol=1e-12)
    again = shapley(values, players, orders=60, seed=1)
    np.testing.assert_array_equal(found.shares, again.shares)


def test_an_order_and_its_reverse_make_up_for_each_other() -> None:
    """Where a player's gain grows with those who are there, v = |S|², the two together are the share exactly."""
    found = shapley(lambda coalitions: (coalitions.sum(1, keepdims=True) ** 2).astype(float), 12, orders=2)
    np.testing.assert_allclose(found.shares, 12)
    np.testing.assert_allclose(found.error, 0, atol=1e-12)
