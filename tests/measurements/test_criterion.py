"""The rule for the ME layer, against a definition that spells it out in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from melayer.data.rows import Row
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion, find_me_layer, voting

shares = st.integers(0, 100).map(lambda percent: percent / 100)


@st.composite
def held(draw):
    """How many of some sequences hold at each of the blocks that were run, of how many sequences and blocks."""
    n_sequences = draw(st.integers(0, 12))
    n_layers = draw(st.integers(1, 40))
    # Mostly long stretches, or hardly any block would last.
    stretches = draw(st.lists(st.tuples(st.integers(0, n_sequences), st.integers(1, 12)), min_size=1, max_size=8))
    n_holding = [count for count, length in stretches for _ in range(length)][:n_layers]
    return n_holding, n_sequences, n_layers


def spelled_out(n_holding, n_sequences, majority, persistence, n_layers):
    """The first block from which on it holds in more than the majority, for at least that share of all blocks."""
    for layer in range(len(n_holding)):
        lasting = 0
        for count in n_holding[layer:]:
            if not n_sequences or Fraction(count, n_sequences) <= Fraction(str(majority)):
                break
            lasting += 1
        if lasting and Fraction(lasting, n_layers) >= Fraction(str(persistence)):
            return layer
    return None


@given(held(), shares, shares)
@example(([1] * 7 + [0] * 93, 1, 100), 0.5, 0.07)  # 0.07 * 100 is a little more than 7
@example(([7] * 3, 100, 3), 0.07, 0.25)
@example(([], 3, 4), 0.5, 0.0)
def test_it_is_the_first_block_that_lasts_in_a_majority(held, majority, persistence):
    n_holding, n_sequences, n_layers = held
    criterion = Criterion(majority=majority, persistence=persistence)
    expected = spelled_out(n_holding, n_sequences, majority, persistence, n_layers)
    assert find_me_layer(n_holding, n_sequences, criterion, n_layers=n_layers) == expected


@given(held(), shares, shares)
def test_what_is_certain_no_later_block_changes(held, majority, persistence):
    n_holding, n_sequences, n_layers = held
    criterion = Criterion(majority=majority, persistence=persistence)
    whole = find_me_layer(n_holding, n_sequences, criterion, n_layers=n_layers)
    for n_run in range(1, len(n_holding) + 1):
        so_far = find_me_layer(n_holding[:n_run], n_sequences, criterion, n_layers=n_layers)
        assert so_far in (None, whole)


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=6))
def test_an_array_of_sequences_is_counted(rows):
    holding = np.array(rows)
    by_hand = [sum(column) for column in zip(*rows, strict=True)]
    found = find_me_layer(holding.sum(axis=0), len(holding), Criterion())
    assert found == find_me_layer(by_hand, len(rows), Criterion())
    assert found == spelled_out(by_hand, len(rows), 0.5, 0.25, 9)


def test_half_of_the_sequences_are_no_majority_and_one_block_less_does_not_last():
    half, more = [0, 2, 2, 2, 2, 2, 2, 2], [0, 3, 3, 0, 3, 0, 0, 0]
    assert find_me_layer(half, 4, Criterion()) is None
    assert find_me_layer(half, 3, Criterion()) == 1
    assert find_me_layer(more, 4, Criterion()) == 1
    assert find_me_layer(more, 4, Criterion(persistence=0.26)) is None


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e3), st.floats(0, 1e6))
def test_the_threshold_is_both_bounds_at_once(min_abs, min_ratio, median, value):
    over = value > min_abs and value > min_ratio * median
    assert (value > Criterion(min_abs=min_abs, min_ratio=min_ratio).threshold(median)) == over


def row(index, length):
    return Row(index, "", (3,) * length, ("w0",) * length, 0, False)


def test_the_long_enough_sequences_vote_or_all_where_there_are_none():
    assert voting([row(0, 8), row(1, 7), row(2, 9)], Criterion()) == [0, 2]
    assert voting([row(0, 8), row(1, 7), row(2, 9)], Criterion(min_tokens=10)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_abs": -1}, "min_abs is -1; expected a number from 0 to 3.4e.38, the largest of float32"),
        ({"min_ratio": float("nan")}, "min_ratio is nan"),
        ({"persistence": 1.5}, "persistence is 1.5; expected a share between 0 and 1"),
        ({"majority": -0.1}, "majority is -0.1"),
    ],
)
def test_bad_criteria_are_said(change, message):
    with pytest.raises(InputError, match=message):
        Criterion(**change)
