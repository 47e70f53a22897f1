"""Numbers for people: rounded for a figure, written for a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ABSENT = "—"
"""Stands on a page where there is no number."""


def rounded(values: ArrayLike | Sequence[float | None], digits: int = 4) -> list[Any]:
    """Numbers for a figure, as nested lists of the same shape, so that a page stays small.

    Args:
        values: Of any shape; None and NaN stand for no number.
        digits: How many significant digits are kept.

    Returns:
        Floats; None, which is JSON's null, where a number is missing or not finite.
    """
    numbers = np.asarray(values, dtype=float)
    flat = [float(f"{value:.{digits - 1}e}") if np.isfinite(value) else None for value in numbers.ravel()]
    nested: list[Any] = np.array(flat, dtype=object).reshape(numbers.shape).tolist()
    return nested


def rectangle(rows: Sequence[Sequence[float | None] | None], width: int | None = None) -> NDArray[np.float64]:
    """Rows of several lengths as one array [rows, width], NaN where a row has no number.

    Args:
        rows: None for a row that has nothing.
        width: By default the length of the longest row.
    """
    if width is None:
        width = max((len(row) for row in rows if row is not None), default=0)
    array = np.full((len(rows), width), np.nan)
    for place, row in enumerate(rows):
        if row is not None:
            array[place, : len(row)] = np.asarray(row, dtype=float)
    return array


def number(value: float | None, digits: int = 0, *, absent: str = ABSENT) -> str:
    """A number with so many digits behind the point, its thousands apart; absent where it is not finite."""
    return absent if value is None or not math.isfinite(value) else unsigned_zero(f"{value:,.{digits}f}")


def percent(value: float | None, digits: int = 1, *, absent: str = ABSENT) -> str:
    """A share in percent; absent where it is not finite."""
    return absent if value is None or not math.isfinite(value) else unsigned_zero(f"{value:.{digits}%}")


def change(value: float | None, digits: int = 1, *, absent: str = ABSENT) -> str:
    """A share in percent with its sign; what rounds to zero has none."""
    return absent if value is None or not math.isfinite(value) else unsigned_zero(f"{value:+.{digits}%}")


def share(value: float | None, *, absent: str = ABSENT) -> str:
    """A share in percent with one digit."""
    return percent(value, absent=absent)


def unsigned_zero(written: str) -> str:
    """A number as it was written, without a sign where all of its digits are zero: there is no "-0.0%"."""
    return written if any(digit in written for digit in "123456789") else written.lstrip("+-")
