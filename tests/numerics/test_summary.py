"""Every summary against a plain computation on the stored activation, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melayer.numerics.summary import MAP_TOKENS, stack, summarise

BOUNDS = {"min_abs": 2.0, "min_ratio": 3.0}


@st.composite
def activations(draw):
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    d_model = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(lengths), max(lengths), d_model, generator=generator) * 2
    for row, length in enumerate(lengths):
        hidden[row, length:] = 1e9  # what stands in the padding must never count
    return hidden, lengths


@given(activations(), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_a_summary_is_what_the_rows_alone_give(drawn, k):
    hidden, lengths = drawn
    found = summarise(hidden, lengths, k=k, **BOUNDS)
    counted, summed = np.zeros(hidden.shape[-1]), np.zeros(hidden.shape[-1])
    for row, length in enumerate(lengths):
        real = hidden[row, :length].double().numpy()
        magnitude = np.abs(real)
        order = np.sort(magnitude.ravel())[::-1]
        kept = min(k, real.size)
        values = found.values[row, :kept].double().numpy()
        np.testing.assert_array_equal(np.abs(values), order[:kept])
        for value, token, dim in zip(values, found.tokens[row, :kept], found.dims[row, :kept], strict=True):
            assert real[token, dim] == value
        assert found.values[row, kept:].isnan().all()
        assert (found.tokens[row, kept:] == -1).all()
        # torch's median of an even number of values is the lower of the two in the middle.
        assert found.median_abs[row].item() == np.sort(magnitude.ravel())[(real.size - 1) // 2]
        bound = max(BOUNDS["min_abs"], BOUNDS["min_ratio"] * found.median_abs[row].item())
        assert found.n_massive[row] == (magnitude > bound).sum()
        norms = np.linalg.norm(real, axis=1)
        top = int(found.tokens[row, 0])
        assert found.top_norm[row].item() == pytest.approx(norms[top], rel=1e-5)
        others = np.sort(np.delete(norms, top))
        if len(others):
            assert found.others_norm[row].item() == pytest.approx(others[(len(others) - 1) // 2], rel=1e-5)
        else:
            assert found.others_norm[row].isnan()
        assert found.n_non_finite[row] == 0
        np.testing.assert_array_equal(found.massive_tokens[row, :length].numpy(), (magnitude > bound).any(axis=1))
        assert not found.massive_tokens[row, length:].any()
        counted += (magnitude > bound).sum(axis=0)
        summed += np.where(magnitude > bound, real, 0.0).sum(axis=0)
        shown = min(length, MAP_TOKENS)
        np.testing.assert_array_equal(found.token_max[row, :shown].numpy(), magnitude.max(axis=1)[:shown])
        assert found.token_max[row, shown:].isnan().all()
    np.testing.assert_array_equal(found.massive_in_dim.numpy(), counted)
    np.testing.assert_allclose(found.massive_sum.numpy(), summed, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted_and_placed(bad):
    hidden = torch.ones(2, 5, 4)
    hidden[1, 3, 2] = bad
    found = summarise(hidden, [5, 5], k=2, **BOUNDS)
    assert found.n_non_finite.tolist() == [0, 1]
    assert (found.tokens[1, 0].item(), found.dims[1, 0].item()) == (3, 2)
    assert found.values[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_adds_nothing_to_the_dimensions(bad):
    hidden = torch.full((2, 9, 4), 0.1)
    hidden[:, 2, 1] = 50.0
    hidden[1, 5, 3] = bad
    found = summarise(hidden, [9, 9], k=2, **BOUNDS)
    assert found.massive_in_dim.tolist() == [0, 1, 0, 0]
    assert found.massive_sum.tolist() == [0.0, 50.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype):
    hidden = torch.full((1, 4, 300), 200.0, dtype=dtype)  # the squares of float16 would overflow
    found = summarise(hidden, [4], k=1, **BOUNDS)
    assert found.top_norm.dtype == torch.float32
    assert found.top_norm.item() == pytest.approx(200 * 300**0.5, rel=1e-5)


def test_stacking_puts_the_layer_in_front():
    summaries = [summarise(torch.full((2, 3, 4), float(layer)), [3, 2], k=1, **BOUNDS) for layer in range(5)]
    stacked = stack(summaries)
    assert stacked.median_abs.shape == (5, 2)
    assert stacked.values[:, 1, 0].tolist() == [0, 1, 2, 3, 4]
