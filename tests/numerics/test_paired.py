import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, permutation_test
from statsmodels.stats import contingency_tables as contingency
from statsmodels.stats import proportion

from melayer.errors import InputError
from melayer.numerics.intervals import paired_share_interval
from melayer.numerics.paired import compare, difference, holm, wilson

counts = st.integers(0, 60)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_against_statsmodels(n, share):
    right = round(n * share)
    found = wilson(right, n)
    low, high = proportion.proportion_confint(right, n, method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


@given(both=counts, wins=counts, losses=counts, neither=counts)
@settings(max_examples=40, deadline=None)
def test_mcnemar_against_statsmodels(both, wins, losses, neither):
    if both + wins + losses + neither == 0:
        return
    base = [1] * both + [0] * wins + [1] * losses + [0] * neither
    other = [1] * both + [1] * wins + [0] * losses + [0] * neither
    found = compare(base, other)
    table = [[both, losses], [wins, neither]]
    exact = min(1.0, contingency.mcnemar(table, exact=True).pvalue)
    # What was found counts half: at one end, or at the middle, where both ends meet.
    point = binom.pmf(wins, wins + losses, 0.5)
    expected = 1.0 if wins + losses == 0 else 1 - point / 2 if wins == losses else exact - point
    assert found.p == pytest.approx(expected)
    assert (found.wins, found.losses, found.ties) == (wins, losses, both + neither)
    assert found.difference == pytest.approx((wins - losses) / len(base))
    assert found.test == "mid-p McNemar"
    low, high = paired_share_interval(wins, losses, len(base))
    assert (found.low, found.high) == (float(low), float(high))


def test_mcnemar_as_published():
    """Fagerland, Lydersen & Laake 2013, table 1: of 21 children 7 and 1 changed; mid-p 0.0391, exact 0.0703."""
    found = compare([1] + [1] * 7 + [0] + [0] * 12, [1] + [0] * 7 + [1] + [0] * 12)
    assert (found.wins, found.losses, found.n) == (1, 7, 21)
    assert round(found.p, 4) == 0.0391


def test_the_test_and_the_interval_say_the_same():
    """Of all tables of up to 60 items that differ, the two are at odds at four; the exact test would be at 27."""
    mid_p, exact = [], []
    for differing in range(1, 61):
        for fewer in range(differing // 2 + 1):
            found = compare(
                [0] * (differing - fewer) + [1] * fewer + [0] * 200, [1] * (differing - fewer) + [0] * fewer + [0] * 200
            )
            outside = found.low > 0
            if outside != (found.p < 0.05):
                mid_p.append((fewer, differing - fewer))
            if outside != (binomtest(fewer, differing).pvalue < 0.05):
                exact.append((fewer, differing - fewer))
    assert mid_p == [(0, 4), (6, 15), (8, 18), (10, 21)]
    assert len(exact) == 27


@given(st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.02]), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)  # statsmodels collects garbage in each call
def test_holm_by_its_definition(values):
    one = compare([0, 1], [1, 1], resamples=10)
    found = [item.p_holm for item in holm([replace(one, p=p) for p in values])]
    # Rejected at level a is whatever has no larger neighbour kept before it: the largest of the smaller p's, each
    # times the number of those that are not smaller.
    for p, adjusted in zip(values, found, strict=True):
        smaller = [q * sum(r >= q for r in values) for q in values if q <= p]
        assert adjusted == min(1.0, max(smaller))


def test_nothing_to_adjust():
    assert holm([]) == []


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.stats.multitest", None)
    with pytest.raises(InputError, match=r"needs statsmodels, which is not installed. .*pip install 'melayer\[eval\]'"):
        holm([compare([0, 1], [1, 1], resamples=10)])


def test_one_item_says_little():
    found = compare([-1.0], [2.5], [3.0])  # no share of its parts
    assert (found.low, found.high, found.shown) == (None, None, False)
    assert found.sentence() == "wins 1, losses 0, ties 0: 1 item of the same change give no interval."
    right = compare([0], [1])
    assert (right.low < -0.5, right.high, right.shown) == (True, 1.0, False)
    parts = compare([0], [2], [2])
    assert (parts.low, parts.high, parts.test) == (-1.0, 1.0, "sign-flip permutation")


def test_what_is_not_finite_is_not_averaged():
    with pytest.raises(InputError, match="A value is not finite"):
        compare([1.0, math.nan], [1.0, 0.0])


def test_a_difference_of_log_losses():
    found = difference([10.0, 20.0, 30.0], [11.0, 20.5, 33.0], [5, 5, 5])
    assert found.value == pytest.approx(0.3)
    assert found.low < 0.3 < found.high
    assert not found.shown
    alone, same = difference([1.0], [2.0], [1]), difference([1.0, 2.0], [1.0, 2.0], [1, 1])
    assert (alone.value, alone.low, alone.high, alone.shown) == (1.0, None, None, False)
    assert (same.value, same.low, same.high, same.shown) == (0.0, None, None, False)


def test_the_permutation_test_against_scipy():
    rng = np.random.default_rng(5)
    base = rng.normal(size=40)
    other = base + rng.normal(0.25, 1, size=40)
    same = permutation_test(
        (base, other), lambda a, b: (b - a).sum(), vectorized=False, permutation_type="samples", n_resamples=9999, rng=1
    )
    assert compare(base.tolist(), other.tolist()).p == pytest.approx(same.pvalue, abs=0.02)


@pytest.mark.parametrize("kind", ["right and wrong", "instructions"])
def test_a_null_is_rejected_at_about_the_nominal_rate(kind):
    """Both variants right with the same chance: at 5 %. What was chosen by is in `docs/statistics.md`."""
    rng = np.random.default_rng(11)
    n, runs = 200, 400
    sizes = np.ones(n, dtype=int) if kind == "right and wrong" else rng.integers(1, 4, n)
    rejected = covered = 0
    for run in range(runs):
        pair = [rng.binomial(sizes, 0.5) for _ in range(2)]
        found = compare(pair[0].tolist(), pair[1].tolist(), sizes.tolist(), resamples=400, seed=run)
        rejected += found.p < 0.05
        covered += found.low <= 0 <= found.high
    # Binomial standard error of 400 runs at 5 %: 1.1 points.
    assert 0.015 < rejected / runs < 0.085
    assert 0.91 < covered / runs < 0.985


def test_a_real_difference_is_found_and_put_in_words():
    base = [0] * 60 + [1] * 40
    gained = compare(base, [1] * 31 + [0] * 29 + [0] * 12 + [1] * 28)
    assert gained.sentence().startswith("wins 31, losses 12, ties 57: a gain of 19.0 points, 95% interval")
    lost = compare([1] * 31 + [0] * 29 + [0] * 12 + [1] * 28, base)
    assert "a loss of 19.0 points" in lost.sentence()
    none = compare(base, [1] + [0] * 59 + [0] + [1] * 39)
    assert "no difference shown (+0.0 points" in none.sentence()
    assert "the data rule out a gain of more than" in none.sentence()
    assert compare(base, base).p == 1.0


def test_few_items_that_differ_rule_little_out():
    """Two won and six lost of 64: a resampled interval ends at 1.6, which those few items do not say."""
    found = compare([1] * 6 + [0] * 58, [0] * 6 + [1] * 2 + [0] * 56)
    assert found.sentence() == (
        "wins 2, losses 6, ties 56: no difference shown (-6.2 points, 95% interval -16.5 to 2.9, p 0.18); the data "
        "rule out a gain of more than 2.9 points and a loss of more than 16.5 points."
    )


def test_no_item_that_differs_rules_out_large_differences_only():
    assert compare([0, 1] * 32, [0, 1] * 32).sentence() == (
        "wins 0, losses 0, ties 64: no item differs (+0.0 points, 95% interval -5.7 to 5.7, p 1); the data rule out a "
        "gain of more than 5.7 points and a loss of more than 5.7 points."
    )
    parts = compare([1, 2] * 32, [1, 2] * 32, [2, 2] * 32)
    assert parts.low == pytest.approx(-parts.high)
    assert 0.02 < parts.high < 0.08
    # Log-losses have no bounds: where all are the same there is nothing to measure their spread by.
    assert compare([-1.5, -2.0], [-1.5, -2.0]).sentence() == "wins 0, losses 0, ties 2: no item differs."


def test_the_interval_of_parts_is_that_of_shares_where_all_are_right_or_wrong():
    """Two ways to nearly the same: with many items that differ, adding one on each side changes little."""
    rng = np.random.default_rng(4)
    base, other = (rng.integers(2, size=400) for _ in range(2))
    shares = compare(base.tolist(), other.tolist())
    parts = compare((3 * base).tolist(), (3 * other).tolist(), [3] * 400)
    assert parts.test == "sign-flip permutation"
    assert (parts.low, parts.high) == pytest.approx((shares.low, shares.high), abs=0.003)


def test_why_the_interval_and_the_test_are_at_odds_is_said():
    four = compare([0] * 200, [1] * 4 + [0] * 196)
    assert "p 0.062 by a test that asks for more than the interval)" in four.sentence()
    assert four.sentence().endswith("the data rule out a gain of more than 5.0 points.")
    ten = holm([compare([0] * 100, [1] * 7 + [0] * 93)] * 10)[0]
    assert "corrected for the number of comparisons, which the interval is not)" in ten.sentence()
    other_way = replace(compare([0, 1] * 9, [1, 1] * 9), low=-0.1, high=0.9)
    assert "p 0.002, but the interval holds 0)" in other_way.sentence()


def test_intervals_are_shown_to_two_digits():
    assert "interval -0.040 to 0.030" in replace(compare([0, 1], [1, 0]), low=-0.0004, high=0.0003).sentence()
    assert "interval -0.40 to 0.40" in replace(compare([0, 1], [1, 0]), low=-0.004, high=0.004).sentence()


def test_adjusting_takes_a_conclusion_back():
    one = compare([0] * 100, [1] * 7 + [0] * 93)
    assert one.p < 0.05
    assert "a gain" in one.sentence()
    adjusted = holm([one] * 10)[0]
    assert adjusted.adjusted > 0.05
    assert "no difference shown" in adjusted.sentence()


def test_the_same_seed_gives_the_same_figures():
    base, other = [1.5, 2.0, 0.5, 1.0], [1.0, 2.5, 1.5, 2.0]
    assert compare(base, other, seed=4) == compare(base, other, seed=4)


def test_items_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match="3 items were given for one variant and 2 for the other"):
        compare([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match="0 items were given"):
        compare([], [])
