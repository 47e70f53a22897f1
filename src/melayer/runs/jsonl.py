"""Files of one JSON value a line that grow while work is done, and survive being cut off at any byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from melayer.errors import OutputError
from melayer.runs import atomic


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, none if it is missing, without a last one that is not written to its end (yet)."""
    content = path.read_bytes() if path.exists() else b""
    # Not splitlines(), which also cuts at separators that JSON strings may hold.
    return content[: _whole(content)].decode("utf-8", errors="replace").split("\n")[:-1]


def mend(path: Path) -> list[str]:
    """`whole_lines`, with the rest cut away, so that more lines can be added."""
    lines = whole_lines(path)
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(_whole(file.read()))
    return lines


def append(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines and waits until they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_line(value) for value in values))
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file anew; a reader sees the old lines or the new ones, never a part."""
    atomic.write_text(path, "".join(_line(value) for value in values))


@contextmanager
def keeping(what: str, path: Path) -> Iterator[None]:
    """Turns what the file system refuses into our error."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"The {what} cannot be kept in {path}: {error.strerror}. Give another place.") from error


def _whole(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"
