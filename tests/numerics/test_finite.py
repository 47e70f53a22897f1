import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from melayer.numerics.finite import finite, finite_all, mean_of_known, ratio
from melayer.numerics.host import stacked

NOT_FINITE = [math.nan, math.inf, -math.inf]


@given(st.floats(width=32))
def test_a_number_is_itself_and_anything_else_none(value):
    found = finite(np.float32(value))
    assert found == (value if math.isfinite(value) else None)
    assert json.dumps(found, allow_nan=False)
    assert finite_all(np.array([value, 1.0])) == (found, 1.0)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_ratios_of_what_is_not_finite_or_to_nothing(value):
    assert ratio(value, 2.0) is None
    assert ratio(2.0, value) is None
    assert ratio(2.0, 0.0) is None
    assert ratio(0.0, 2.0) == 0.0
    assert ratio(-1.0, 4.0) == -0.25


def test_means_leave_out_what_is_not_there():
    assert mean_of_known([1.0, None, 2.0]) == 1.5
    assert mean_of_known(value for value in (0.0,)) == 0.0
    assert mean_of_known([None]) is None
    assert mean_of_known([]) is None


def test_tensors_are_stacked_on_the_host_without_loss():
    found = stacked([torch.tensor([1 + 2**-20, 2.0]), torch.tensor([3.0, 4.0])])
    assert found.dtype == np.float64
    assert found.tolist() == [[1 + 2**-20, 2.0], [3.0, 4.0]]
