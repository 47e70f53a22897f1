"""The rows of a file, of whatever kind it is: each has its place, and is decoded on its own.

One rule for all: a line ends at a line feed, and a carriage return right before it belongs to the end. Nothing else
ends a line: no carriage return alone, no form feed, no U+0085, U+2028 or U+2029. Blank lines are no rows.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from melayer.data.encodings import as_utf8
from melayer.data.files import opened, require_pyarrow, shown
from melayer.data.formats import Format
from melayer.errors import InputError, border, first_line, reason

MAX_BYTES = 64 * 2**20
"""Of one row; a longer one is left out, so that memory is bounded whatever a file holds."""
MAX_LIST_BYTES = 256 * 2**20
"""Of a JSON list, which is read whole."""
_REST = 1 << 20  # bytes at once of a line that is too long
_ROWS = 1024  # of a parquet file at a time
_DIGITS = "Exceeds the limit"  # what Python says of integers of more than 4,300 digits
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)


class BadRowError(Exception):
    """A row cannot be used; the message says why, and the run goes on without it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row as it stands in the file."""

    noun: str
    number: int
    """From 1, as editors count."""
    content: Any
    decode: Callable[[Any], Any]

    @property
    def place(self) -> str:
        """For messages: `line 3`."""
        return f"{self.noun} {self.number:,}"

    def value(self) -> Any:
        """The text of a line, or the JSON value or the columns of a row.

        Raises:
            BadRowError: There is none.
        """
        return self.decode(self.content)


@dataclass(frozen=True, slots=True)
class Skipped:
    """So many rows that nobody wants, and that were not read."""

    count: int


Needed = Callable[[range], bool]
"""Whether any of these rows, counted from 0, is wanted."""
Chosen = Callable[[Sequence[str]], Sequence[str]]
"""Of the columns that a parquet file has, those to read."""


def entries(path: Path, format: Format, *, chosen: Chosen = list, needed: Needed = bool) -> Iterator[Entry | Skipped]:
    """The rows of a file, in order.

    Args:
        path: The file.
        format: What it is, see `format_of`.
        chosen: Of a parquet file, which columns are read; by default all.
        needed: Of a parquet file, which row groups are read at all.

    Raises:
        InputError: It cannot be read to its end.
    """
    todo = "Copy or download it again."
    with border(f"The file {shown(path)} cannot be read to its end", todo):
        if format.kind == "parquet":
            yield from _of_parquet(path, chosen, needed)
            return
        with opened(path) as raw, as_utf8(raw, format.encoding) as file:
            if format.kind == "CSV":
                yield from _of_csv(file, path)
            elif format.kind == "JSON list":
                yield from _of_list(file, path, strings=format.strings)
            else:
                decode = text_of if format.kind == "text" else string_or_object if format.strings else json_of
                yield from (Entry("line", number, line, decode) for number, line in _lines(file) if line != b"")


def whole(path: Path, format: Format) -> Entry:
    """A file as one row: its text, whatever it looks like.

    Raises:
        InputError: It cannot be read to its end.
    """
    with border(f"The file {shown(path)} cannot be read to its end", "Copy or download it again."):
        with opened(path) as raw, as_utf8(raw, format.encoding) as file:
            content = file.read(MAX_BYTES + 1)
        return Entry("line", 1, content if len(content) <= MAX_BYTES else None, text_of)


def count_lines(path: Path, format: Format) -> int:
    """The rows of a file of lines."""
    with (
        border(f"The file {shown(path)} cannot be read to its end", "Copy or download it again."),
        opened(path) as raw,
        as_utf8(raw, format.encoding) as file,
    ):
        return sum(bool(line.strip()) for line in file)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Each line without its end, with its number; empty where it is blank, None where it is too long."""
    number = 0
    while line := file.readline(MAX_BYTES + 2):
        number += 1
        if len(line) == MAX_BYTES + 2 and not line.endswith(b"\n"):
            while (rest := file.readline(_REST)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif not line.strip():
            yield number, b""
        else:
            content = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
            yield number, content if len(content) <= MAX_BYTES else None


def text_of(content: bytes | None) -> str:
    """The text of a line.

    Raises:
        BadRowError: It is too long, no UTF-8, or holds zero bytes, which no text file does.
    """
    if content is None:
        raise BadRowError(f"it is longer than {MAX_BYTES:,} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8") from error
    if "\0" in text:
        raise BadRowError(f"it holds a zero byte, at character {text.index(chr(0))}")
    return text


def json_of(content: bytes | None) -> Any:
    """The JSON value of a line, which is no string: where there are objects, that is a fault.

    Raises:
        BadRowError: It is none, or a string.
    """
    return _no_string(string_or_object(content))


def string_or_object(content: bytes | None) -> Any:
    """The JSON value of a line.

    Raises:
        BadRowError: It is none.
    """
    return _json(text_of(content))


def _no_string(value: Any) -> Any:
    if isinstance(value, str):
        raise BadRowError("a string and no object with columns")
    return value


def _json(text: str) -> Any:
    try:
        # Files that were put together have the marks of all of them.
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadRowError(_why(error)) from error


def _why(error: BaseException) -> str:
    why = reason(error)
    return "it has an integer of more than 4,300 digits" if why.startswith(_DIGITS) else f"no JSON: {why}"


def _as_it_is(value: Any) -> Any:
    return value


def _bad(why: str) -> Any:
    raise BadRowError(why)


def _of_list(file: IO[bytes], path: Path, *, strings: bool) -> list[Entry]:
    """The elements of a JSON list; one that is broken costs no other."""
    content = file.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise InputError(
            f"{shown(path)} is a JSON list of more than {MAX_LIST_BYTES:,} bytes, which is read whole. Write one "
            "object a line: jq -c '.[]'"
        )
    # What is not UTF-8 becomes lone surrogates, which cost the element in which they stand.
    text = content.decode("utf-8", errors="surrogateescape")
    decoder, place, number = json.JSONDecoder(), text.index("[") + 1, 0
    place = _behind_space(text, place)
    found: list[Entry] = []  # all before the first is given: a list that is cut off is none
    while not text.startswith("]", place):
        number += 1
        try:
            value, end = decoder.raw_decode(text, place)
            found.append(Entry("element", number, value, _as_it_is if strings else _no_string))
        except (ValueError, RecursionError, MemoryError) as error:
            end = _end_of_element(text, place, path, number)
            found.append(Entry("element", number, _why(error), _bad))
        end = _behind_space(text, end)
        if text.startswith(",", end):
            end = _behind_space(text, end + 1)
        elif not text.startswith("]", end):
            raise InputError(_no_list(path, number))
        place = end
    if text[place + 1 :].strip():
        raise InputError(f"{shown(path)} begins as a JSON list, but goes on behind its end. Write one object a line.")
    return found


def _behind_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _end_of_element(text: str, place: int, path: Path, number: int) -> int:
    """Where a broken element ends, by its brackets alone: without recursion, however deep they are."""
    depth = 0
    for match in _STRUCTURE.finditer(text, place):
        found = match.group()
        if found in ("[", "{"):
            depth += 1
        elif depth == 0 and found in (",", "]", "}"):
            return match.start()
        elif found in ("]", "}"):
            depth -= 1
    raise InputError(_no_list(path, number))


def _no_list(path: Path, number: int) -> str:
    return (
        f"{shown(path)} begins as a JSON list, but is none from element {number:,} on. Copy or download it again; "
        "--whole-file takes it as one text, as it stands."
    )


def _of_csv(file: IO[bytes], path: Path) -> Iterator[Entry]:
    """The rows of a table, each as a dictionary of its columns."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_BYTES))  # it is 131,072 characters otherwise
    # What is not UTF-8 becomes lone surrogates, which cost the row in which they stand.
    with io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
        yield from _of_table(csv.reader(lines, dialect="excel-tab" if ".tsv" in path.name.lower() else "excel"))


def _of_table(rows: Any) -> Iterator[Entry]:
    header: list[str] | None = None
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Entry("line", rows.line_num, f"no CSV: {first_line(error)}", _bad)
            continue
        if not fields:
            continue
        if header is None:
            header = fields
        elif len(fields) > len(header):
            yield Entry("line", rows.line_num, f"{len(fields)} fields under {len(header)} columns", _bad)
        else:
            missing = [None] * (len(header) - len(fields))
            yield Entry("line", rows.line_num, dict(zip(header, [*fields, *missing], strict=True)), _as_it_is)


def parquet_file(path: Path) -> Any:
    """A parquet file, opened.

    Raises:
        InputError: It is none, or pyarrow is not installed.
    """
    require_pyarrow(f"{shown(path)} is parquet")
    from pyarrow import parquet

    with border(f"{shown(path)} cannot be read as parquet", "Copy or download it again."):
        return parquet.ParquetFile(path)


def _of_parquet(path: Path, chosen: Chosen, needed: Needed) -> Iterator[Entry | Skipped]:
    with parquet_file(path) as file:
        wanted = chosen(file.schema_arrow.names)
        begin = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if not needed(range(begin, begin + count)):
                yield Skipped(count)
            else:
                yield from _of_group(file, group, range(begin, begin + count), wanted)
            begin += count


def _of_group(file: Any, group: int, places: range, wanted: Sequence[str]) -> Iterator[Entry]:
    read = 0
    try:
        # A row group may be larger than the memory.
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted):
            for row in range(batch.num_rows):
                yield Entry("row", places[read] + 1, (batch, row), _row)
                read += 1
    except Exception as error:  # noqa: BLE001 - whatever pyarrow says, it costs this group and no other
        why = f"row group {group} is corrupt: {first_line(error)}"
        yield from (Entry("row", place + 1, why, _bad) for place in places[read:])


def _row(at: tuple[Any, int]) -> dict[str, Any]:
    batch, row = at
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            found[name] = column[row].as_py()
        except Exception as error:
            # A date beyond time, text that is no UTF-8.
            raise BadRowError(f"its column {name!r} cannot be read: {reason(error)}") from error
    return found
