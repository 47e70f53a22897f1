"""What can be done against the massive token before activations are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Treatment = Literal["plain", "baked", "baked+mask", "mask"]
"""`plain`: nothing. `baked`: the prefix is keys and values in full precision. `mask`: attention reads a relaxed massive
token in every pass. `baked+mask`: the prefix is baked under the mask."""
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
BAKED: tuple[Treatment, ...] = ("baked", "baked+mask")
MASKED: tuple[Treatment, ...] = ("baked+mask", "mask")
WITHOUT_MASK: Mapping[Treatment, Treatment] = {"mask": "plain", "baked+mask": "baked"}
"""For each masked treatment the same without its mask."""
