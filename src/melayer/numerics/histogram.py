"""Histograms of |x| whose bins are the leading bits of a float32: any quantile to 1 % without a logarithm.

Exponent and the first six bits behind it make 64 bins for each doubling, none wider than 1.6 % of its value. All
histograms have the same bins, so that they add up exactly, in any order.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

FP16_OVERFLOW = 65520.0
"""From here on float16 rounds to infinity: half a step above 65504, its largest number."""

_KEPT_BITS = 6
_DROPPED = 23 - _KEPT_BITS
_LOWEST, _HIGHEST = -24, 40  # exponents of two: the smallest float16 is 2^-24, and nothing is known to pass 2^40
_FIRST = (127 + _LOWEST) << _KEPT_BITS
BINS = ((_HIGHEST - _LOWEST) << _KEPT_BITS) + 2
"""Bin 0 holds what is below 2^-24, zeros too; the last one what is from 2^40 on, infinities and NaN too."""

_UP = 1 << 12
"""The bits are rounded up by so much that a bin begins exactly at FP16_OVERFLOW, 0x477FF000."""
# Of the bits less this, those that a bin drops gone, its number is left: one subtraction, in which nothing overflows.
_BEGIN = ((_FIRST - 1) << _DROPPED) - _UP
_OVERFLOW_BIN = (0x477FF000 - _BEGIN) >> _DROPPED


def counts(
    magnitude: torch.Tensor,
    groups: torch.Tensor,
    n_groups: int,
    *,
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """[n_groups, BINS] int64, how many of each group's values fall into each bin; nothing is asked of the device.

    Args:
        magnitude: [rows, d] |x| in float32, contiguous.
        groups: [rows] int32, the group of each row.
        n_groups: How many groups there are.
        buffers: An int32 and an int16 tensor of magnitude's shape to write in.
    """
    wide, bins = buffers or (torch.empty_like(magnitude, dtype=of) for of in (torch.int32, torch.int16))
    torch.sub(magnitude.view(torch.int32), _BEGIN, out=wide).bitwise_right_shift_(_DROPPED)
    # The count runs on one thread and waits for what others have written: half the bytes, a fifth of its time less.
    bins.copy_(wide).clamp_(0, BINS - 1)
    if n_groups > 1:
        bins = (groups * BINS).unsqueeze(1) + bins
    return torch.bincount(bins.view(-1), minlength=n_groups * BINS).view(n_groups, BINS)


def bins_of(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each value, on the host."""
    bits = np.abs(values.astype(np.float32)).view(np.int32).astype(np.int64)
    bins: NDArray[np.int64] = np.clip((bits - _BEGIN) >> _DROPPED, 0, BINS - 1)
    return bins


@cache
def edges() -> NDArray[np.float64]:
    """[BINS + 1] where each bin begins; the last one ends at infinity. Not to be written in, nor are the next two."""
    bits = _BEGIN + (np.arange(1, BINS, dtype=np.int64) << _DROPPED)
    begins = bits.astype(np.int32).view(np.float32).astype(np.float64)
    edges = np.concatenate([[0.0], begins, [np.inf]])
    edges.setflags(write=False)
    return edges


@cache
def edges_on(device: torch.device) -> torch.Tensor:
    """`edges` on a device."""
    return torch.tensor(edges(), device=device)


@cache
def middles() -> NDArray[np.float64]:
    """[BINS] a value of each bin that is within 1 % of all in it; 0 for the first and infinity for the last one."""
    ends = edges()
    middle = (ends[:-1] + ends[1:]) / 2
    middle[0] = 0.0
    middle.setflags(write=False)
    return middle


def quantile(counted: NDArray[np.int64], share: float) -> float | None:
    """The value that `share` of the counted ones do not exceed, to 1 %; 0 below 2^-24, None if nothing was counted."""
    total = int(counted.sum())
    if not total:
        return None
    rank = min(int(np.ceil(share * total)), total)
    place = int(np.searchsorted(np.cumsum(counted), max(rank, 1)))
    return float(middles()[place])


def overflowing(counted: NDArray[np.int64]) -> int:
    """How many of the counted values become infinite in float16 (or are not finite already)."""
    return int(counted[_OVERFLOW_BIN:].sum())
