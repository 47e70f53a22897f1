import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test
from statsmodels.stats import contingency_tables as contingency
from statsmodels.stats import proportion

from melayer.errors import InputError
from melayer.numerics.paired import LEVEL, compare, holm, interval, wilson

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
    found = compare(base, other, resamples=50)
    table = [[both, losses], [wins, neither]]
    assert found.p == pytest.approx(min(1.0, contingency.mcnemar(table, exact=True).pvalue))
    assert (found.wins, found.losses, found.ties) == (wins, losses, both + neither)
    assert found.difference == pytest.approx((wins - losses) / len(base))
    assert found.test == "exact McNemar"


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


def test_the_bootstrap_against_every_resample():
    """Of five items there are 5 ** 5 resamples, so that the interval can be had without drawing."""
    base, other, sizes = np.array([[1, 2, 0, 3, 1], [2, 1, 2, 3, 4], [2, 3, 2, 4, 5]])
    every = np.array(list(itertools.product(range(5), repeat=5)))
    shares = (other - base)[every].sum(axis=1) / sizes[every].sum(axis=1)
    found = compare(base.tolist(), other.tolist(), sizes.tolist(), resamples=200_000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), abs=1e-9)
    assert found.test == "sign-flip permutation"


def drawn(change, sizes, resamples, seed):
    """Interval and p-value from the same random numbers, by numpy alone."""
    draws, flips = (np.random.default_rng([seed, purpose]) for purpose in range(2))
    chosen = draws.integers(len(change), size=(resamples, len(change)))
    low, high = np.quantile(change[chosen].sum(axis=1) / sizes[chosen].sum(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    changed = change[change != 0]
    signs = flips.integers(2, size=(resamples, len(changed))) * 2 - 1
    larger = np.abs(signs @ changed) >= abs(changed.sum()) * (1 - 1e-9)
    return low, high, (larger.sum() + 1) / (resamples + 1)


@pytest.mark.parametrize("n", [2, 7, 40, 3000])
@pytest.mark.parametrize("kind", ["instructions", "log-likelihoods", "tenths"])
def test_figures_depend_on_the_seed_alone(n, kind):
    """The numbers of every version so far: what was published with a seed can be had again."""
    rng = np.random.default_rng([n, len(kind)])
    sizes = rng.integers(1, 5, n).astype(float)
    draw = {
        "instructions": lambda: rng.binomial(sizes.astype(int), 0.5).astype(float),
        "log-likelihoods": lambda: rng.normal(-100, 30, n),
        "tenths": lambda: rng.integers(0, 9, n) * 0.1,
    }[kind]
    base, other = draw(), draw()
    other[0] = base[0] + 0.5  # not all of them the same
    found = compare(base.tolist(), other.tolist(), sizes.tolist(), resamples=2000, seed=n)
    assert (found.low, found.high, found.p) == drawn(other - base, sizes, 2000, n)
    assert interval(base.tolist(), other.tolist(), sizes.tolist(), resamples=2000, seed=n)[1:] == (
        found.low,
        found.high,
    )


def test_one_item_is_always_itself():
    found = compare([1.0], [2.5], [3.0])
    assert (found.difference, found.low, found.high) == (0.5, 0.5, 0.5)


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
    """Both variants right with the same chance: at 5 %, and exact tests of few discordant pairs rather less."""
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
    assert compare(base, base).sentence().endswith("no item differs.")
    # Four wins in two hundred: the interval leaves out 0, the exact test does not call it a difference.
    few = compare([0] * 200, [1] * 4 + [0] * 196).sentence()
    assert "no difference shown (+2.0 points, 95% interval 0.5 to 4.0, p 0.12)" in few
    assert few.endswith("the data rule out a gain of more than 4.0 points.")
    assert compare(base, base).p == 1.0


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
