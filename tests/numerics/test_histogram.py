"""Bins are the leading bits: counts are exact, quantiles are right to 1 %, whatever the values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from melayer.numerics import histogram

floats = st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=64)


def counted(values) -> np.ndarray:
    magnitude = torch.as_tensor(values, dtype=torch.float32).abs()[None]
    return histogram.counts(magnitude, torch.zeros(1, dtype=torch.int32), 1)[0].numpy()


@given(floats)
def test_each_value_is_in_its_bin(values):
    magnitude = np.abs(np.array(values, dtype=np.float32))
    bins, ends = histogram.bins_of(magnitude), histogram.edges()
    finite = np.isfinite(magnitude)
    assert (ends[bins][finite] <= magnitude[finite]).all()
    assert (magnitude[finite] < ends[bins + 1][finite]).all()
    assert (bins[~finite] == histogram.BINS - 1).all()
    assert (np.bincount(bins, minlength=histogram.BINS) == counted(values)).all()


@given(st.lists(st.floats(min_value=2**-20, max_value=2**39, width=32), min_size=1, max_size=64), st.floats(0, 1))
def test_quantiles_are_right_to_one_percent(values, share):
    exact = np.sort(np.array(values, dtype=np.float32))[max(int(np.ceil(share * len(values))) - 1, 0)]
    assert histogram.quantile(counted(values), share) == pytest.approx(exact, rel=0.01)


@given(floats, floats)
def test_histograms_add_up(left, right):
    assert (counted(left) + counted(right) == counted([*left, *right])).all()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**16))
def test_groups_are_counted_apart(n_groups, d, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, n_groups, (9,), generator=generator, dtype=torch.int32)
    values = torch.randn(9, d, generator=generator).mul(4).exp()
    found = histogram.counts(values, groups, n_groups).numpy()
    for group in range(n_groups):
        assert (found[group] == counted(values[groups == group].flatten())).all()


def test_overflow_begins_where_float16_rounds_to_infinity():
    below = np.nextafter(np.float32(65520), np.float32(0))
    assert np.isfinite(torch.tensor(below).half().item())
    assert np.isinf(torch.tensor(65520.0).half().item())
    assert histogram.overflowing(counted([below, 65504.0, -65504.0])) == 0
    assert histogram.overflowing(counted([65520.0, -1e6, np.inf, np.nan])) == 4


def test_every_nan_is_counted():
    made_by_gpus = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert counted(made_by_gpus)[-1] == 1


def test_nothing_counted_has_no_quantile():
    assert histogram.quantile(np.zeros(histogram.BINS, dtype=np.int64), 0.5) is None
    assert histogram.quantile(counted([0.0, 0.0]), 0.5) == 0.0
