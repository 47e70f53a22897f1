"""Intervals against published examples, an inversion of their own, and a small simulation with a fixed seed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq, minimize_scalar

from melayer.numerics.intervals import paired_share_interval, ratio_interval

# (wins, losses, n, level, low, high), to the digits published.
PUBLISHED = {
    "Tango 1998, 32 pairs": (9, 3, 32, 0.95, -0.027, 0.390),
    "Tango 1998, 44 pairs": (0, 1, 44, 0.90, -0.096, 0.037),
    "Agresti & Min 2005": (16, 8, 86, 0.95, -0.020, 0.207),
    "Fagerland, Lydersen & Laake 2014": (1, 7, 21, 0.95, -0.517, -0.026),
}


@pytest.mark.parametrize(("wins", "losses", "n", "level", "low", "high"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_examples(wins, losses, n, level, low, high):
    found = paired_share_interval(wins, losses, n, level=level)
    assert tuple(round(float(end), 3) for end in found) == (low, high)


def inverted(wins, losses, n, level):
    """The score test turned round, with the likeliest share of losses found by search and not by its formula."""
    z = stats.norm.ppf((1 + level) / 2)

    def score(d):
        def cost(q):
            cells = ((wins, q + d), (losses, q), (n - wins - losses, 1 - 2 * q - d))
            return -math.fsum(count * math.log(share) for count, share in cells if count)

        least, most = max(0.0, -d), (1 - d) / 2
        q = minimize_scalar(cost, bounds=(least + 1e-13, most - 1e-13), method="bounded", options={"xatol": 1e-13}).x
        return (wins - losses - n * d) / math.sqrt(n * (2 * q + d - d * d))

    found, edge = (wins - losses) / n, 1e-9
    low = brentq(lambda d: score(d) - z, -1 + edge, found - edge)
    high = brentq(lambda d: score(d) + z, found + edge, 1 - edge)
    return low, high


@given(n=st.integers(3, 300), data=st.data())
@settings(max_examples=40, deadline=None)
def test_against_an_inversion_by_search(n, data):
    wins = data.draw(st.integers(0, n - 1))
    losses = data.draw(st.integers(0, n - 1 - wins))
    low, high = paired_share_interval(wins, losses, n)
    assert (float(low), float(high)) == pytest.approx(inverted(wins, losses, n, 0.95), abs=2e-5)


@given(n=st.integers(1, 400), data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_holds_of_every_table(n, data):
    wins = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - wins))
    low, high = map(float, paired_share_interval(wins, losses, n))
    assert -1 <= low <= (wins - losses) / n <= high <= 1
    assert low < high
    mirrored = paired_share_interval(losses, wins, n)
    assert (-float(mirrored[1]), -float(mirrored[0])) == pytest.approx((low, high), abs=1e-9)
    wider = paired_share_interval(wins, losses, n, level=0.99)
    assert float(wider[0]) <= low
    assert high <= float(wider[1])


def test_tables_at_the_edge():
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (1, 2, 64, 2000):
        none = paired_share_interval(0, 0, n)
        assert tuple(map(float, none)) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))
        won, lost = paired_share_interval(n, 0, n), paired_share_interval(0, n, n)
        assert float(won[1]) == 1
        assert float(lost[0]) == -1
        assert float(won[0]) == pytest.approx((n - z2) / (n + z2)) == -float(lost[1])
    both = paired_share_interval([0, 3], [2, 0], 10)
    assert [end.shape for end in both] == [(2,), (2,)]


def exact_coverage(n, differing, difference):
    """The chance that the interval holds the true difference, summed over all tables."""
    won, lost = (differing + difference) / 2, (differing - difference) / 2
    wins, losses = (found.ravel() for found in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    possible = wins + losses <= n
    wins, losses = wins[possible], losses[possible]
    chance = stats.multinomial.pmf(np.stack([wins, losses, n - wins - losses], -1), n, [won, lost, 1 - won - lost])
    likely = chance > 1e-9
    low, high = paired_share_interval(wins[likely], losses[likely], n)
    return chance[likely][(low <= difference) & (difference <= high)].sum()


@pytest.mark.parametrize("differing", [0.02, 0.05, 0.125, 0.3])
@pytest.mark.parametrize("part", [0, 0.5, 0.9])
def test_coverage_with_few_items_that_differ(differing, part):
    """No simulation: with 64 items every table is counted. The protocol accepts 94 % and more."""
    assert exact_coverage(64, differing, differing * part) >= 0.94


def covered(values, sizes, truth, **options):
    found = [ratio_interval(value, size, **options) for value, size in zip(values, sizes, strict=True)]
    return np.mean([ends is not None and ends[0] <= truth <= ends[1] for ends in found])


def test_coverage_of_means_by_simulation():
    """2,000 draws have a standard error of half a point at 95 %; the bounds are four of them away."""
    rng = np.random.default_rng(17)
    draws, n = 2000, 30
    ones = np.ones((draws, n))
    assert 0.93 <= covered(rng.normal(0.3, 1, (draws, n)), ones, 0.3) <= 0.97
    assert 0.93 <= covered(rng.standard_t(3, (draws, n)), ones, 0) <= 0.98
    lengths = np.exp(rng.normal(6, 0.5, (draws, n)))
    by_length = lengths * 0.2 + np.sqrt(lengths) * rng.normal(0, 1, (draws, n))
    assert 0.925 <= covered(by_length, lengths, 0.2) <= 0.97


def test_few_items_that_differ_need_the_two_that_are_added():
    """One item in fifty gains or loses a part: without more the interval misses a third of the time and worse."""
    rng = np.random.default_rng(18)
    draws, n = 1000, 50
    sizes = np.full((draws, n), 2.0)
    change = np.where(rng.random((draws, n)) < 0.02, np.where(rng.random((draws, n)) < 0.7, 1, -1), 0)
    truth = 0.02 * 0.4 / 2
    assert covered(change, sizes, truth) < 0.8
    assert covered(change, sizes, truth, added=(2, -2)) >= 0.95


def test_a_t_interval_where_sizes_are_one():
    values = [0.3, -1.2, 2.5, 0.1, 0.4]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert ratio_interval(values, [1] * 5, level=0.9) == pytest.approx((expected.low, expected.high))


def test_no_interval_without_a_spread():
    assert ratio_interval([3.0], [1.0]) is None
    assert ratio_interval([0.1, 0.3, 0.2], [1, 3, 2]) is None  # one ratio, up to rounding
    assert ratio_interval([0.0, 0.0], [1, 1]) is None
    low, high = ratio_interval([0.0, 0.0], [1, 1], added=(1, -1))
    assert low == -high < 0
