"""Figures that JSON can hold: a number, or None where there is none that is finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def finite(value: float | np.floating[Any] | None) -> float | None:
    """The value as a plain number; None where it is NaN, infinite, or not there."""
    return float(value) if value is not None and math.isfinite(value) else None


def finite_all(values: NDArray[np.floating[Any]]) -> tuple[float | None, ...]:
    """`finite` of each of the values [n]."""
    return tuple(map(finite, values.tolist()))


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None where the whole is 0, or one of them is not finite."""
    return part / whole if whole and math.isfinite(part) and math.isfinite(whole) else None


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there; None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
