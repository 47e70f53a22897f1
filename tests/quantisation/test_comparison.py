"""Costs and what treatments change, held against sums by hand."""

import math

import pytest
from scipy.stats import ttest_1samp

from melayer.errors import InputError
from melayer.quantisation.comparison import compared, difference
from melayer.quantisation.result import PerplexityScore, Setting
from melayer.quantisation.scoring import require_finite, score_of

N = 4
"""Tokens that each sequence predicts."""


def setting(treatment, sums, format="int8", granularity="per-token"):
    return Setting(format, granularity, treatment, score_of(sums, N), None, None, None, (), ())


def test_a_score_is_the_mean_over_all_tokens():
    found = score_of([4.0, 12.0], N)
    assert found == PerplexityScore(2.0, math.exp(2.0), (4.0, 12.0))
    require_finite(found)


@pytest.mark.parametrize(
    ("sums", "kept"), [([4.0, math.nan], (4.0, None)), ([math.inf, 1.0], (None, 1.0)), ([8000.0, 1.0], (8000.0, 1.0))]
)
def test_a_score_that_is_no_number_is_none(sums, kept):
    assert score_of(sums, N) == PerplexityScore(None, None, kept)


def test_only_a_loss_that_is_not_finite_is_refused():
    require_finite(score_of([8000.0, 1.0], N))
    with pytest.raises(InputError, match="the log-losses of the unquantised model are not finite"):
        require_finite(score_of([1.0, math.inf], N))


def test_a_difference_is_that_of_the_means_with_its_interval():
    found = difference(score_of([4.0, 8.0, 6.0], N), score_of([6.0, 12.0, 9.0], N), N)
    assert found.value == pytest.approx(9 / 12)
    expected = ttest_1samp([2 / N, 4 / N, 3 / N], 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.shown
    alone = difference(score_of([4.0], N), score_of([6.0], N), N)
    assert (alone.value, alone.low, alone.high) == (0.5, None, None)
    assert not alone.shown


@pytest.mark.parametrize(("base", "other"), [([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [math.inf, 2.0])])
def test_where_a_loss_is_not_finite_there_is_no_difference(base, other):
    assert difference(score_of(base, N), score_of(other, N), N) is None


def test_each_is_compared_with_its_like():
    sums = {"plain": [8.0, 8.0], "baked": [4.0, 4.0], "baked+mask": [3.0, 3.0], "mask": [6.0, 6.0]}
    other = [setting("mask", [40.0, 40.0], format="int4"), setting("plain", [20.0, 20.0], granularity="per-tensor")]
    rows = list(compared([*(setting(of, by) for of, by in sums.items()), *other], score_of([2.0, 2.0], N), N))
    found = {
        (row.format, row.granularity, row.treatment): [
            None if of is None else of.value * N for of in (row.cost, row.against_plain, row.by_mask)
        ]
        for row in rows
    }
    assert found == {
        ("int8", "per-token", "plain"): [6, None, None],
        ("int8", "per-token", "baked"): [2, -4, None],
        ("int8", "per-token", "baked+mask"): [1, -5, -1],  # of the mask: against baked
        ("int8", "per-token", "mask"): [4, -2, -2],
        ("int4", "per-token", "mask"): [38, None, None],  # there is no plain int4
        ("int8", "per-tensor", "plain"): [18, None, None],
    }
