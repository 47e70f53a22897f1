"""Grids against torch's own operators, and against what a grid is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melayer.numerics.grids import FORMATS, LARGEST, quantised, scales

INTEGERS = ("int8", "int4")
values = st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=40).map(torch.tensor)
steps = st.floats(2.0**-10, 1024.0, width=32).map(torch.tensor)
formats = st.sampled_from(FORMATS)


def matrix(seed=0, shape=(3, 7, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, shape[-1])


@given(values, steps, formats)
def test_what_is_on_the_grid_stays(x, scale, format):
    once = quantised(x, scale, format)
    assert torch.equal(quantised(once, scale, format), once)


@given(values, steps, st.sampled_from(INTEGERS))
def test_the_error_is_half_a_step_inside_and_the_end_is_kept_outside(x, scale, format):
    end = LARGEST[format] * scale
    found = quantised(x, scale, format)
    inside = x.abs() <= end
    slack = 1e-5 * x.abs() + 1e-6 * scale
    assert bool(((found - x).abs() <= scale / 2 + slack)[inside].all())
    assert torch.equal(found[~inside], (torch.sign(x) * end)[~inside])


@given(values, steps)
def test_fp8_is_the_cast_of_torch(x, scale):
    found = quantised(x, scale, "fp8")
    inside = (x / scale).abs() <= 448
    assert torch.equal(found[inside], ((x / scale).to(torch.float8_e4m3fn).float() * scale)[inside])
    assert torch.equal(found[~inside], (torch.sign(x) * 448 * scale)[~inside])


@given(values, formats)
def test_the_maximum_is_the_end_of_its_grid(x, format):
    scale = scales(x.abs().max(), format)
    assert scale.dtype == torch.float32
    found = quantised(x, scale, format)
    assert bool(torch.isfinite(found).all())
    largest = x.abs().argmax()
    assert found[largest].item() == pytest.approx(x[largest].item(), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("format", INTEGERS)
@settings(max_examples=50)
@given(seed=st.integers(0, 1000))
def test_integers_agree_with_torch(format, seed):
    x, end = matrix(seed), int(LARGEST[format])
    zero = torch.zeros((), dtype=torch.int32)
    # torch multiplies by the reciprocal: at the middle between two steps it may take the other one.
    for scale, theirs in (
        (s := scales(x.abs().max(), format), torch.fake_quantize_per_tensor_affine(x, s, zero, -end, end)),
        (
            s := scales(x.abs().amax((0, 1)), format),
            torch.fake_quantize_per_channel_affine(x, s, zero.repeat(16), 2, -end, end),
        ),
    ):
        ours = quantised(x, scale, format)
        middle = ((x / scale).frac().abs() - 0.5).abs() < 1e-4
        torch.testing.assert_close(ours[~middle], theirs[~middle], rtol=1e-6, atol=0)
        assert bool(((ours - theirs).abs() <= 1.001 * scale).all())
    per_token = scales(x.abs().amax(-1, keepdim=True), format)
    rows = torch.stack(
        [quantised(row, s[0], format) for row, s in zip(x.view(-1, 16), per_token.view(-1, 1), strict=True)]
    )
    assert torch.equal(quantised(x, per_token, format).view(-1, 16), rows)


def test_halves_go_to_even_and_the_grids_are_symmetric():
    one = torch.tensor(1.0)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 300.0, -300.0])
    assert quantised(x, one, "int4").tolist() == [0, 2, 2, 0, -2, 6, 7, -7]
    assert quantised(x, one, "int8").tolist() == [0, 2, 2, 0, -2, 6, 127, -127]
    assert quantised(torch.tensor([17.0, 19.0, 500.0]), one, "fp8").tolist() == [16, 20, 448]


@pytest.mark.parametrize("format", FORMATS)
def test_a_maximum_of_nothing(format):
    x = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    scale = scales(x.abs().amax(0), format)
    found = quantised(x, scale, format)
    assert found[:, 0].tolist() == [0, 0]
    # A channel that held nothing in calibration passes nothing on.
    beyond = quantised(torch.tensor([[5.0, 5.0]]), scale, format)
    assert beyond[0, 0] < 1e-30
    assert beyond[0, 1] == 2


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_seen(format):
    found = quantised(torch.tensor([math.nan, math.inf, -math.inf, 1.0]), torch.tensor(1.0), format)
    assert math.isnan(found[0])
    assert found[1:].tolist() == [LARGEST[format], -LARGEST[format], 1]


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_given_is_changed_and_halves_come_back_as_float32(format):
    for dtype in (torch.float32, torch.bfloat16):
        x = matrix().to(dtype)
        kept, scale = x.clone(), scales(x.abs().max(), format)
        found = quantised(x, scale, format)
        assert found.dtype == torch.float32
        assert torch.equal(x, kept)
        assert torch.equal(found, quantised(x.float(), scale, format))
