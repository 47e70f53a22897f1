"""Files of one JSON object a line that grow while work is done, and survive being cut off at any byte.

Each line ends with the checksum of what stands before it, so that a digit that was changed is not taken for a figure.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melayer.errors import InputError, OutputError, reason
from melayer.runs import atomic, ours, records
from melayer.runs.json_text import json_text

CHECKSUM = "crc32"
"""The last field of each line: the CRC-32 of the line without it, as hexadecimal digits."""

_END = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


@dataclass(frozen=True)
class Lines:
    """What a file holds."""

    values: list[dict[str, Any]]
    rest: bytes
    """A last line that does not end."""


def read(path: Path, said: str, todo: str) -> Lines:
    """The objects of a file, without a last line that is not written to its end (yet); nothing is changed.

    Lines of the first version have no checksum, and then no line has one.

    Args:
        path: The file; none is as an empty one.
        said: What a line was read as, for example "run.jsonl holds no sweep that can be read".
        todo: What to do, a sentence.

    Raises:
        InputError: A line is no JSON object, or not what was written.
        OutputError: The file cannot be read.
    """
    try:
        content = ours.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return Lines([], b"")
    except (OSError, ValueError) as error:
        raise OutputError(f"{said}: {reason(error)}. {todo}") from error
    # Not splitlines(), which also cuts at separators that JSON strings may hold.
    *lines, rest = content.split(b"\n")
    found = [_unsealed(line) for line in lines]
    sealed = sum(checksum is not None for _, checksum in found)
    for number, (line, checksum) in enumerate(found, start=1):
        if (checksum is None and sealed) or (checksum is not None and checksum != zlib.crc32(line)):
            raise InputError(f"{said}: line {number} is not as it was written (its checksum differs). {todo}")
    values = [
        records.parse(line, dict[str, Any], f"{said}: line {number}", todo)
        for number, (line, _) in enumerate(found, start=1)
    ]
    return Lines(values, rest)


def append(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines and waits until they are on the disk.

    Raises:
        OSError: They cannot be written; what of them was, is taken back.
    """
    content = "".join(line_of(value) for value in values).encode("utf-8")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        before = os.fstat(handle).st_size
        try:
            written = 0
            while written < len(content):
                written += os.write(handle, content[written:])
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def replace(path: Path, values: Iterable[Mapping[str, Any]], *, own: bool = False) -> None:
    """Writes a file anew; a reader sees the old lines or the new ones, never a part.

    Args:
        path: The file.
        values: Its lines.
        own: As for `atomic.staged`.
    """
    atomic.write_text(path, "".join(line_of(value) for value in values), own=own)


@contextmanager
def keeping(what: str, path: Path) -> Iterator[None]:
    """Turns what the file system refuses into our error."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"The {what} cannot be kept in {path}: {reason(error)}. Give another place.") from error


def line_of(value: Mapping[str, Any]) -> str:
    """A line with its checksum and its end."""
    text = json_text(value, ascii_only=True)
    return f'{text[:-1]}, "{CHECKSUM}": "{zlib.crc32(text.encode("ascii")):08x}"}}\n'


def _unsealed(line: bytes) -> tuple[bytes, int | None]:
    """A line without its checksum, and that."""
    match = _END.search(line)
    return (line, None) if match is None else (line[: match.start()] + b"}", int(match[1], 16))
