import random

import pytest

from llmux.simulator.statistics import beyond, compare, mean, quantile


def waits(count, seed, shift=0.0, noise=0.0):
    dice, noisy = random.Random(seed), random.Random(seed + 1)
    return [max(0.0, dice.expovariate(0.1) - shift + noisy.gauss(0.0, noise)) for _ in range(count)]


def test_a_small_gain_on_the_same_requests_is_seen():
    found = compare(waits(400, 1), waits(400, 1, shift=0.5))
    assert found.after < found.before
    assert found.sure > 0.99
    assert 0.0 < found.gain < 0.1


def test_what_differs_by_chance_is_not_sure_mostly():
    sure = [compare(waits(400, 1), waits(400, 1, noise=8.0), seed=seed).sure for seed in range(5)]
    unsure = [compare(waits(400, seed), waits(400, seed + 100)).sure for seed in range(20)]
    assert sum(0.05 < each < 0.95 for each in unsure) >= 15
    assert max(sure) - min(sure) < 0.2


def test_the_same_is_neither_better_nor_worse():
    assert compare(waits(100, 1), waits(100, 1)).sure == 0.5
    assert compare([], []).sure == 0.5
    assert compare([1.0] * 10, [2.0] * 10).sure == 0.5  # too few
    assert compare([0.0] * 100, [0.0] * 100).gain == 0.0
    assert compare([0.0] * 100, [1.0] * 100).gain < 0.0


def test_a_burst_in_which_all_gains_lie_is_one_observation():
    before = [10.0] * 1000
    after = [10.2] * 950 + [0.0] * 50
    assert compare(before, after).after < 10.0
    assert compare(before, after).sure < 0.95


@pytest.mark.parametrize(
    ("measure", "expected"),
    [(mean, 3.0), (quantile(0.5), 2.0), (quantile(0.95), 9.0), (beyond(2.0), 0.4), (beyond(99.0), 0.0)],
)
def test_measures(measure, expected):
    assert measure([1.0, 2.0, 0.0, 9.0, 3.0], [1.0] * 5) == pytest.approx(expected)


def test_weights():
    assert mean([1.0, 9.0], [3.0, 1.0]) == 3.0
    assert quantile(0.5)([1.0, 9.0], [1.0, 3.0]) == 9.0
    assert beyond(5.0)([1.0, 9.0], [1.0, 3.0]) == 0.75
    assert (mean([], []), quantile(0.5)([], []), beyond(1.0)([], [])) == (0.0, 0.0, 0.0)
    recent = [0.0] * 200 + [1.0] * 200
    assert compare([5.0] * 400, [1.0] * 200 + [9.0] * 200, weights=recent).sure == 0.0
