"""The rows that a run trains on, wherever they are: in a file of any kind, on the hub, or in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.data.entries import BadRowError, Entry, entries, parquet_file
from melayer.data.files import is_there, require_file, shown
from melayer.data.formats import Format, format_of
from melayer.errors import InputError, border

if TYPE_CHECKING:
    from datasets import Dataset

_LOOKED_AT = 1000  # rows in which the names of columns are looked for
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".gz", ".zst", ".txt")

Placed = tuple[str, Callable[[], Any]]
"""Where a row stands, for messages; and what gives it, which may say that it cannot be read."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where rows come from."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[Placed]]
    """Given the columns that are wanted, each row in order."""


def source_of(data: Any) -> Source:
    """What rows are in a file, a data set of the hub, a `datasets.Dataset` or a list of dictionaries.

    JSON is read row by row by Python itself, so that a broken row costs no other.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    from datasets import Dataset

    if isinstance(data, (str, Path)):
        path = Path(os.path.expanduser(data))  # noqa: PTH111 - Path.expanduser raises where nobody has that name
        if is_there(path) or _means_file(str(data)):
            return _of_file(path, str(data))
        return _of_table(_of_the_hub(str(data)), str(data))
    if isinstance(data, Dataset):
        return _of_table(data, "the data")
    return _of_list(list(data))


def _means_file(source: str) -> bool:
    return source.lower().endswith(_SUFFIXES) or source.startswith((".", "/", "~")) or len(source) > 200


def _of_file(path: Path, name: str) -> Source:
    name = shown(name)
    if not is_there(path) and len(str(path)) <= 200:
        raise InputError(f"There is no file {name}. Give a file with training rows, or a data set on the hub.")
    require_file(path)
    format = format_of(path)
    if format is None:
        raise InputError(f"{name} is empty. Give a file with at least one row.")
    if format.kind == "text":
        raise InputError(
            f"{name} is not a file of rows but plain text; expected JSON lines, a JSON list, parquet or CSV (by its "
            "name, .csv), also compressed."
        )
    columns = _columns(path, format)
    if not columns:
        why = _first_fault(path, format)
        raise InputError(f"No row of {name} can be used{why}. Give rows with columns: JSON objects, parquet or CSV.")
    return Source(name, columns, partial(_rows_of_file, path, format))


def _rows_of_file(path: Path, format: Format, wanted: Sequence[str]) -> Iterator[Placed]:
    def chosen(present: Sequence[str]) -> list[str]:
        return [name for name in present if name in wanted]

    for entry in entries(path, format, chosen=chosen):
        if isinstance(entry, Entry):
            yield entry.place, entry.value


def _columns(path: Path, format: Format) -> tuple[str, ...]:
    """The names that any of the first rows has, in the order in which they come."""
    if format.kind == "parquet":
        with parquet_file(path) as file:
            return tuple(file.schema_arrow.names)
    names: dict[str, None] = {}
    looked_at = 0
    for entry in entries(path, format):
        try:
            row = entry.value() if isinstance(entry, Entry) else None
        except BadRowError:
            continue
        if isinstance(row, Mapping):
            names |= dict.fromkeys(row)
            looked_at += 1
        if looked_at == _LOOKED_AT:
            break
    return tuple(names)


def _first_fault(path: Path, format: Format) -> str:
    for entry in islice(entries(path, format), 1):
        assert isinstance(entry, Entry)
        try:
            value = entry.value()
        except BadRowError as error:
            return f"; the first, {entry.place}: {error}"
        return f"; the first, {entry.place}, is {str(value)[:40]!r}"
    return "; it has none"


def _of_the_hub(source: str) -> Dataset:
    from datasets import Dataset, load_dataset

    with border(
        f"{source} is not a file here, and cannot be had from the hub",
        "Check the name and the network, or give a file.",
    ):
        found = load_dataset(source, split="train", trust_remote_code=False)
    assert isinstance(found, Dataset)
    return found


def _of_table(table: Dataset, name: str) -> Source:
    if not len(table):
        raise InputError(f"{name} has no row. Give at least one.")

    def rows(wanted: Sequence[str]) -> Iterator[Placed]:
        some = table.select_columns(list(dict.fromkeys(wanted)))
        for place in range(len(some)):
            yield f"row {place}, counted from 0", partial(some.__getitem__, place)

    return Source(name, tuple(table.column_names), rows)


def _of_list(given: list[Any]) -> Source:
    if not given:
        raise InputError("the data has no row. Give at least one.")
    names: dict[str, None] = {}
    for row in given:
        if isinstance(row, Mapping):
            names |= dict.fromkeys(row)

    def rows(wanted: Sequence[str]) -> Iterator[Placed]:
        for place, row in enumerate(given):
            yield f"row {place}, counted from 0", partial(_as_it_is, row)

    return Source("the data", tuple(names), rows)


def _as_it_is(row: Any) -> Any:
    return row
