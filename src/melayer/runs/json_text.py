"""JSON that every reader takes: without NaN, infinities and lone surrogates, whatever the values hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """A value as JSON.

    A number that is not finite becomes null; a lone surrogate, which is no character and cannot be written as UTF-8 (a
    file name in another encoding holds such), becomes the text of its escape: `\\udce9`.

    Args:
        value: Plain values, mappings and sequences.
        indent: As for `json.dumps`.
        ascii_only: Escape everything beyond ASCII, for where it goes in an encoding that may not have it.
    """
    return json.dumps(writable(value), ensure_ascii=ascii_only, indent=indent, allow_nan=False)


def writable(value: Any) -> Any:
    """The value as JSON can hold it, see `json_text`."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {well_formed(key) if isinstance(key, str) else key: writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [writable(item) for item in value]
    return value


def well_formed(text: str) -> str:
    """The text with the escapes of lone surrogates in their place."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text
