"""What the values of options say: lists, rates, blocks, sizes."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded


LARGEST_SEED = 2**32 - 1
"""What every source of random numbers takes: numpy's older one no more."""
LARGEST = 2**31 - 1
"""Of any other number of things."""
LARGEST_SIZE = 3.4e38
"""What float32 holds, which activations are compared in."""


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises InputError where a number of an option is none that can be counted or compared with.

    Args:
        values: Of all options, by their names in Python.
    """
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not abs(value) <= LARGEST_SIZE:  # NaN is not, either
            raise InputError(f"{option} is {value}; expected a finite number, and at most {LARGEST_SIZE:g}.")
        if isinstance(value, int) and not isinstance(value, bool):
            largest = LARGEST_SEED if name == "seed" else LARGEST
            if not -largest <= value <= largest:
                shown = str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
                raise InputError(f"{option} is {shown}; expected at most {largest}.")


def items_of(value: str) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in value.split(",") if item.strip()]


def rates_of(value: str) -> list[float]:
    """The numbers that `0,0.1,...,1` names: `...` goes on in steps of the two before it to the one behind it."""
    rates: list[float] = []
    items = items_of(value)
    for place, item in enumerate(items):
        if item == "...":
            if place < 2 or place + 1 == len(items) or "..." in items[place - 2 : place]:
                raise InputError(f"--rates {value!r} was given; '...' stands behind two rates and before the last one.")
            continue
        try:
            rate = float(item)
        except ValueError as error:
            raise InputError(f"--rates {value!r} was given; {item!r} is not a number. Give e.g. 0,0.5,1.") from error
        if place and items[place - 1] == "...":
            rates += _between(rates[-2], rates[-1], rate, value)
        rates.append(rate)
    return rates


def _between(before: float, first: float, last: float, value: str) -> list[float]:
    """The rates behind `first` and before `last`, in steps of `first - before`."""
    step = first - before
    count = round((last - first) / step) if step and math.isfinite((last - first) / step) else 0
    if not 0 < count <= 1000 or abs(first + count * step - last) > 1e-6:
        raise InputError(f"--rates {value!r} was given; steps of {step:g} do not lead to {last:g}.")
    # 0.1 + 0.2 is not 0.3 in binary, and the same rate is to be found again in a file.
    return [round(first + step * number, 10) for number in range(1, count)]


def memory_of(value: str | None) -> dict[int | str, str] | None:
    """What `0=20GiB,cpu=60GiB` says, as `from_pretrained` takes it."""
    if value is None:
        return None
    sizes: dict[int | str, str] = {}
    for item in value.split(","):
        device, equals, size = item.strip().partition("=")
        if not (equals and device and re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", size.strip(), re.IGNORECASE)):
            raise InputError(f"--max-memory {value!r} was given; expected e.g. 0=20GiB,cpu=60GiB.")
        sizes[int(device) if re.fullmatch(r"[0-9]{1,9}", device) else device] = size.strip()
    return sizes


def blocks_of(option: str, value: str | None) -> list[range] | None:
    """The blocks that `2,9-11,20-` names; the last one goes on to the end, wherever that is."""
    if value is None:
        return None
    blocks = []
    for item in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:([-:])\s*(\d{0,9})\s*)?", item)
        if match is None or (match[2] == ":" and match[3]):
            raise InputError(
                f"{option} {value!r} was given; expected blocks counted from 0, for example 11 or 2,9-11 or 12-."
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[3]) if match[3] else sys.maxsize - 1
        if last < first:
            raise InputError(f"{option} {value!r} goes from {first} down to {last}. Give the smaller block first.")
        blocks.append(range(first, last + 1))
    return blocks


def layers_of(blocks: list[range] | None, loaded: Loaded, parts: Mapping[str, str]) -> tuple[int, ...] | None:
    """The numbers of the blocks, now that the model says how many it has."""
    if blocks is None:
        return None
    from melayer.model import wiring

    n_layers = wiring.read(loaded.model, parts=parts).n_layers
    layers: list[int] = []
    for span in blocks:
        last = n_layers - 1 if span.stop == sys.maxsize else span.stop - 1
        if max(last, span.start) >= n_layers:
            raise InputError(
                f"Layer {max(last, span.start)} was asked for, but the model has blocks 0 to {n_layers - 1}. "
                "Give layers in that range, counted from 0."
            )
        layers += range(span.start, last + 1)
    return tuple(layers)
