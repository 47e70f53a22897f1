import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melayer.presentation.numbers import change, number, percent, rectangle, rounded, share


def test_rounded_keeps_so_many_significant_digits_in_the_same_shape():
    assert rounded(np.array([[123456.0, 0.000123456], [-1.99999, 0.0]])) == [[123500.0, 0.0001235], [-2.0, 0.0]]
    assert rounded([1 / 3], 2) == [0.33]
    assert rounded([]) == []
    assert rounded(np.zeros((0, 3))) == []


def test_rounded_says_null_where_there_is_no_number():
    assert rounded([None, float("nan"), float("inf"), -np.inf, 1]) == [None, None, None, None, 1.0]


@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300, max_value=1e300)
    | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=-1e-300),
    st.integers(1, 17),
)
def test_rounding_is_off_by_at_most_half_of_the_last_digit(value, digits):
    (found,) = rounded([value], digits)
    # The leading digit is at least 1, so that a unit of the last digit is at most this share of the value.
    assert abs(found / value - 1) <= 0.5 * 10.0 ** (1 - digits) + 1e-15


def test_single_precision_is_rounded_as_the_number_that_it_is():
    assert rounded(np.array([0.1], np.float32), 4) == [0.1]


def test_rectangle_has_nothing_where_a_row_has_nothing():
    found = rectangle([(1.0, None), None, (2.0, 3.0, 4.0)])
    np.testing.assert_array_equal(found, [[1, np.nan, np.nan], [np.nan] * 3, [2, 3, 4]])
    assert rectangle([None, None]).shape == (2, 0)
    assert rectangle([(1.0,)], width=3).shape == (1, 3)
    with pytest.raises(ValueError, match="could not broadcast"):
        rectangle([(1.0, 2.0)], width=1)


def test_numbers_for_tables():
    assert number(1234567.891) == "1,234,568"
    assert number(-1234.5678, 2) == "-1,234.57"
    assert number(None) == "—"
    assert number(None, absent="-") == "-"
    assert percent(0.12345) == "12.3%"
    assert percent(1.5, 0) == "150%"
    assert percent(None) == "—"
    assert (percent(-0.0001), share(-0.0001), change(-0.0001), number(-0.04, 1)) == ("0.0%", "0.0%", "0.0%", "0.0")
    assert (change(-0.1001), change(0.05), number(-0.06, 1)) == ("-10.0%", "+5.0%", "-0.1")
    for value in (math.nan, math.inf, -math.inf):
        assert {write(value) for write in (number, percent, share, change)} == {"—"}
    assert (share(-0.1), share(-0.001), share(None)) == ("-10.0%", "-0.1%", "—")
