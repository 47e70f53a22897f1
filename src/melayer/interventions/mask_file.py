"""`melayer_mask.json`: a mask on the disk, checked whole before any of it is used."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melayer.errors import InputError
from melayer.runs import records

VERSION = 1
_AGAIN = "Save it again with mask.save(...)."


@dataclass
class _Versioned:
    version: int


@dataclass
class _MadeFor:
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic looks for it here

    family: str
    n_layers: int
    d_model: int
    fingerprint: str


@dataclass
class _Mask:
    """The first version's fields; `by_layer` came to it later."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    version: int
    rate: float
    strength: float
    selector: str
    layers: list[int] | None
    positions: str
    seed: int
    dims: list[int] | None
    me_layer: int | None
    massive_above: float | None
    made_for: _MadeFor | None
    by_layer: list[list[int]] | None = None


def read(path: Path) -> dict[str, Any]:
    """The fields of the mask in a file, each of its type; their values are for WeMask to check.

    Raises:
        FileNotFoundError: There is none.
        InputError: It cannot be read, is of another type, or a newer melayer wrote it.
    """
    said = f"{path} cannot be read as a mask"
    content = records.content_of(path, said, _AGAIN)
    version = records.parse(content, _Versioned, f"{path} is no mask", _AGAIN).version
    if version > VERSION:
        raise InputError(f"{path} has version {version}, this melayer reads {VERSION}. Install a newer melayer.")
    if version != VERSION:
        raise InputError(f"{path} has version {version}, which no melayer has written. {_AGAIN}")
    values: dict[str, Any] = asdict(records.parse(content, _Mask, said, _AGAIN))
    for name in ("layers", "dims"):
        _require_sorted(path, name, values[name])
    for row in values["by_layer"] or ():
        _require_sorted(path, "by_layer", row)
    del values["version"]
    return values


def _require_sorted(path: Path, name: str, given: list[int] | None) -> None:
    """`save` writes each number once and in order: anything else was not written by it."""
    if given is not None and any(left >= right for left, right in itertools.pairwise(given)):
        raise InputError(f"{path} cannot be read as a mask: {name} has a number twice, or not in order. {_AGAIN}")
