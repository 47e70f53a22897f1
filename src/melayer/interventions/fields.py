"""Numbers in descriptions of edits, held to what they should be: `"12"` is no list, True no number, NaN no size."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from melayer.errors import InputError

MOST = 2**31
"""No block, dimension or neuron has a number as large."""
_LONGEST = 2**20
"""No list of them is longer."""


def whole(name: str, given: Any, *, most: int = MOST) -> int:
    """A whole number from 0 to below `most`, also one of numpy's.

    Raises:
        InputError: It is something else.
    """
    try:
        # What is true or false has an index, too.
        value = -1 if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except (TypeError, ValueError):
        value = -1
    if not 0 <= value < most:
        raise InputError(f"{name} is {shown(given)}; expected a whole number from 0 to {most - 1}.")
    return value


def numbers(name: str, given: Any) -> tuple[int, ...]:
    """Whole numbers, in the order given.

    Raises:
        InputError: It is no list of them.
    """
    if isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise InputError(f"{name} is {shown(given)}; expected a list of whole numbers.")
    items = list(itertools.islice(given, _LONGEST + 1))
    if len(items) > _LONGEST:
        raise InputError(f"{name} has more than {_LONGEST} entries; expected fewer.")
    return tuple(whole(f"An entry of {name}", item) for item in items)


def real(name: str, given: Any, expected: str, *, most: float = math.inf) -> float:
    """A finite number from 0 to `most`.

    Args:
        name: What it is called.
        given: What was given.
        expected: What is expected, in words.
        most: The largest.

    Raises:
        InputError: It is something else.
    """
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, (Real, np.number)):
        raise InputError(f"{name} is {shown(given)}; expected {expected}.")
    try:
        value = float(given)
    except (OverflowError, TypeError):  # an integer beyond any float; a complex number
        value = math.nan
    if not (0 <= value <= most and math.isfinite(value)):
        raise InputError(f"{name} is {shown(given)}; expected {expected}.")
    return value


def shown(given: Any) -> str:
    """What was given, in a few characters."""
    try:
        text = repr(given)
    except (ValueError, RecursionError):  # 5,000 digits
        text = f"a {type(given).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"
