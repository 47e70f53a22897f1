"""What a file of texts or rows is, told by its content: text, JSON lines, a JSON list, parquet; CSV by its name."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from melayer.data.encodings import CONVERT, Encoding, as_utf8, encoding_of
from melayer.data.files import opened, shown
from melayer.errors import InputError, border

Kind = Literal["text", "JSON lines", "JSON list", "parquet", "CSV"]

SAMPLE = 1 << 16
"""Bytes of a file that are looked at."""
PARQUET = b"PAR1"
_OTHERS = {
    b"PK\x03\x04": "a zip archive",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"%PDF-": "a PDF",
    b"\x7fELF": "a program",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GGUF\x02\0": "a GGUF model",
    b"GGUF\x03\0": "a GGUF model",
    b"ARROW1\0\0": "an Arrow file",
    b"SQLite format 3": "a database",
    b"\x89HDF": "an HDF5 file",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "compressed twice",
    b"\x28\xb5\x2f\xfd": "compressed twice",
    b"\xfd7zXZ": "compressed twice",
}
_TAR_AT = 257
_CSV = (".csv", ".tsv")
# A line that begins so is meant as an object, whether or not it is one.
_OBJECT = re.compile(rb'\s*\{\s*("|\}|$)')
_LIST = re.compile(rb'\s*\[\s*(\{|"|\[|null|$)')


@dataclass(frozen=True)
class Format:
    """How a file is to be read."""

    kind: Kind
    encoding: Encoding = Encoding("utf-8")  # noqa: RUF009 - frozen
    strings: bool = False
    """Of JSON: its values are strings, each a text, and no objects with columns."""
    compressed: bool = False

    @property
    def said(self) -> str:
        """For a sentence: `JSON lines in UTF-16-LE`."""
        kind = "a JSON list" if self.kind == "JSON list" else self.kind
        return kind if self.encoding.name == "utf-8" else f"{kind} in {self.encoding.name.upper()}"


def format_of(path: Path, *, whole: bool = False) -> Format | None:
    """What a file is; None where it is empty.

    Args:
        path: The file; it may be compressed.
        whole: It is one text, whatever it looks like.

    Raises:
        InputError: It cannot be read, or is nothing that holds texts.
    """
    name = f"The file {shown(path)}"
    with border(f"{name} cannot be read to its end", "Copy or download it again."):
        with opened(path) as file:
            beginning = file.read(SAMPLE)
        with path.open("rb") as raw:
            compressed = raw.read(SAMPLE) != beginning
    if beginning.startswith(PARQUET):
        if compressed:
            raise InputError(f"{name} is parquet inside of another compression. Decompress it first.")
        return Format("parquet")
    _require_text(beginning, name)
    encoding = encoding_of(beginning, name)
    lines = _first_lines(path, encoding, name)
    if not lines:
        return None
    if whole:
        return Format("text", encoding, compressed=compressed)
    kind, strings = _kind(lines, path, name)
    return Format(kind, encoding, strings, compressed)


def _first_lines(path: Path, encoding: Encoding, name: str) -> list[bytes]:
    """The first lines of a file that are not blank, in UTF-8, as far as a sample goes; the last one may be cut off."""
    with (
        border(f"{name} cannot be read to its end", "Copy or download it again."),
        opened(path) as raw,
        as_utf8(raw, encoding) as file,
    ):
        sample = file.read(SAMPLE)
        while len(sample) == SAMPLE and not sample.strip():
            sample = file.read(SAMPLE)
    lines = [line.removeprefix(codecs.BOM_UTF8) for line in sample.split(b"\n") if line.strip()]
    return lines[:-1] if len(sample) == SAMPLE and len(lines) > 1 else lines


def is_table_by_name(path: Path) -> bool:
    """Whether a file's name says that it is CSV, which content alone cannot tell from text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return any(suffix in _CSV for suffix in suffixes[-2:])


def _require_text(beginning: bytes, name: str) -> None:
    for mark, kind in _OTHERS.items():
        if beginning.startswith(mark):
            raise InputError(f"{name} is {kind}; expected text, JSON lines, a JSON list, parquet or CSV.")
    if beginning[_TAR_AT : _TAR_AT + 5] == b"ustar":
        raise InputError(f"{name} is a tar archive. Unpack it, and give what is in it.")


def _kind(lines: Sequence[bytes], path: Path, name: str) -> tuple[Kind, bool]:
    """What a file with these lines is, and whether its values are strings."""
    if is_table_by_name(path):
        return "CSV", False
    begun = _LIST.match(lines[0])
    if begun and (len(lines) == 1 or _parsed(lines[0]) is _BROKEN):
        first = begun[1] or lines[min(1, len(lines) - 1)].lstrip()[:1]
        return "JSON list", first == b'"'
    if _OBJECT.match(lines[0]) and len(lines) > 1 and _goes_on(lines):
        raise InputError(
            f"{name} is JSON, but an object takes several lines; expected one a line, or a list. Write it so: jq -c ."
        )
    objects = sum(bool(_OBJECT.match(line)) for line in lines)
    values = [_parsed(line) for line in lines if not _OBJECT.match(line)]
    others = sum(value is _BROKEN for value in values)
    if objects and objects >= others:
        return "JSON lines", False
    if not objects and not others and any(isinstance(value, (str, list)) for value in values):
        return "JSON lines", any(isinstance(value, str) for value in values)
    bad = sum(not _is_text(line) for line in lines)
    if 2 * bad > len(lines):
        said = "zero bytes or other bytes" if any(b"\0" in line for line in lines) else "bytes"
        raise InputError(
            f"{name} is no text in UTF-8: {bad:,} of the first {len(lines):,} lines hold {said} that are none. If it "
            f"is text, {CONVERT[0].lower()}{CONVERT[1:]}"
        )
    return "text", False


def _goes_on(lines: Sequence[bytes]) -> bool:
    """Whether the object that the first line begins goes on in the second."""
    return _parsed(lines[0]) is _BROKEN and lines[1].lstrip().startswith((b'"', b"}"))


class _Broken:
    """No JSON value."""


_BROKEN = _Broken()


def _parsed(line: bytes) -> object:
    try:
        value: object = json.loads(line)
    except RecursionError:
        return []  # a list or an object, and which does not matter
    except (ValueError, MemoryError):
        return _BROKEN
    return value


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in line
