"""Numbers rounded to the grids that int8, int4 and fp8 kernels compute with, and back to float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

Format = Literal["int8", "int4", "fp8"]
"""int8 and int4: symmetric, without a zero point. fp8: e4m3 without infinities (`torch.float8_e4m3fn`)."""
FORMATS: tuple[Format, ...] = get_args(Format)

LARGEST: Mapping[Format, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The largest number of each grid, in steps of its scale; the smallest is its negative."""

_SMALLEST = torch.finfo(torch.float32).tiny
"""Of a scale: a maximum of 0 makes a grid on which everything is nearly 0, and 0 / 0 stays out of it."""


def scales(max_abs: torch.Tensor, format: Format) -> torch.Tensor:
    """The step size of a grid that ends at `max_abs`, float32, of the same shape."""
    return (max_abs.float() / LARGEST[format]).clamp(min=_SMALLEST)


def quantised(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """`x` rounded to the nearest number of the grid, half to even, and back, float32; beyond its end it saturates.

    A NaN stays one. (torch's `fake_quantize_*` make a number of it, are four to ten times slower on a CPU, and know
    no grid for each token; on numbers the two agree, see the tests.)

    Args:
        x: [..., d], of any dtype.
        scale: From `scales`, on the same device: [] for the whole tensor, [..., 1] for each token, [d] for each
            channel.
        format: The grid.
    """
    largest = LARGEST[format]
    steps = (x.float() / scale).clamp_(-largest, largest)
    # Beyond 448 torch's cast gives NaN, so it must come after the clamp.
    on_grid = steps.to(torch.float8_e4m3fn).float() if format == "fp8" else steps.round_()
    return on_grid.mul_(scale)
