"""Files of ours read back: every field is of the type that it should be, or nothing of the file is used."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from melayer.errors import InputError, MelayerError, reason
from melayer.runs import ours
from melayer.runs.json_text import json_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Kind = TypeVar("Kind")
SEAL = "crc32"
"""The field with the CRC-32 of all others, as hexadecimal digits."""


def parse(
    content: str | bytes,
    kind: type[Kind] | TypeAdapter[Kind],
    said: str,
    todo: str,
    error: type[MelayerError] = InputError,
) -> Kind:
    """A value of a type from JSON, checked whole and without conversions: `"12"` is no number, `1` no text.

    Args:
        content: The JSON, as text or UTF-8.
        kind: A dataclass, a TypedDict or another annotation that pydantic knows, or pydantic's adapter of one.
        said: What it was read as, for example "mask.json cannot be read as a mask".
        todo: What to do, a sentence.
        error: What is raised.

    Returns:
        The value; JSON's lists become tuples where the type has tuples.

    Raises:
        InputError: It is no JSON or of another type; the sentence names the first field that is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as invalid:
        raise error(f"{said}: {_first(invalid)}. {todo}") from invalid
    except (ValueError, RecursionError, MemoryError) as other:  # what a field's own check or constructor raises
        raise error(f"{said}: {reason(other)}. {todo}") from other


def read(
    path: Path, kind: type[Kind] | TypeAdapter[Kind], said: str, todo: str, error: type[MelayerError] = InputError
) -> Kind:
    """`parse` of a file.

    Raises:
        FileNotFoundError: There is none, which means something else at each place.
        InputError: It cannot be read, or as `parse`.
    """
    return parse(content_of(path, said, todo, error), kind, said, todo, error)


def content_of(path: Path, said: str, todo: str, error: type[MelayerError] = InputError) -> bytes:
    """What is in a file; of a pipe or a device nothing is read, since it might never end.

    Raises:
        FileNotFoundError: There is none.
        InputError: It cannot be read.
    """
    try:
        return ours.read_bytes(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, MemoryError) as unreadable:
        raise error(f"{said}: {reason(unreadable)}. {todo}") from unreadable


def read_sealed(
    path: Path, kind: type[Kind] | TypeAdapter[Kind], said: str, todo: str, error: type[MelayerError] = InputError
) -> Kind:
    """`read` of values that were `sealed`, if they were: those of the first version are not.

    Raises:
        FileNotFoundError: There is no file.
        InputError: They are not what was sealed, or as `read`.
    """
    values = unsealed(read(path, dict[str, Any], said, todo, error), said, todo, error)
    return parse(json_text(values), kind, said, todo, error)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a checksum of them all as the last field, whatever the spaces between them in a file."""
    return {**values, SEAL: _checksum(values)}


def unsealed(values: Mapping[str, Any], said: str, todo: str, error: type[MelayerError] = InputError) -> dict[str, Any]:
    """The values without their checksum; those of the first version have none.

    Raises:
        InputError: They are not those that it was made of.
    """
    rest = {key: value for key, value in values.items() if key != SEAL}
    if SEAL in values and values[SEAL] != _checksum(rest):
        raise error(f"{said}: it is not as it was written (its checksum differs). {todo}")
    return rest


def _checksum(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json_text(values, ascii_only=True).encode('ascii')):08x}"


def _first(invalid: ValidationError) -> str:
    """The first thing that is wrong: where, what is asked, what stands there."""
    first: Any = invalid.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if first["type"] in ("value_error", "json_invalid", "missing"):
        return f"{where}: {what}" if where else what
    given = repr(first["input"])
    given = given if len(given) <= 60 else given[:59] + "…"
    return f"{where or 'it'}: {what[:1].lower()}{what[1:]}, and {given} stands there"
