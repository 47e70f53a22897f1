"""A corpus of any size as a stream of documents: lines, JSON lines, parquet, or a data set of the hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from melayer.errors import InputError

_TEXT, _JSON = (".txt", ".text", ".raw", ".md"), (".jsonl", ".ndjson")
_KINDS = (*_TEXT, *_JSON, ".parquet")
_COLUMNS = ("text", "content", "document", "body")
_COUNTED_BYTES = 2**30
"""Lines of a larger file are not counted beforehand: that would be reading it twice."""
MAX_NAMED = 20
"""How many of the documents left out are named; all are counted."""


Mine = Callable[[int], bool]


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    index: int
    """Its place in the corpus, from 0; those left out count."""
    text: str
    category: str


@dataclass(frozen=True)
class LeftOut:
    """A document that cannot be read."""

    index: int
    reason: str


@dataclass(frozen=True)
class Corpus:
    """Where the documents are, and which of a row's columns matter."""

    source: str
    """A file (.txt, .jsonl or .parquet; the first two also as .gz), or a hub id."""
    column: str | None = None
    """The column with the text; by default the usual names."""
    category: str | None = None
    """A column by which documents are kept apart."""
    split: str = "train"
    """Of a data set of the hub."""
    whole_file: bool = False
    """A text file is one document, not one a line."""

    def check(self) -> None:
        """Raises InputError for whatever can be told from the first document, before a model is loaded."""
        if not self._may_be_on_the_hub:
            next(self.documents(stop=1), None)

    @property
    def _may_be_on_the_hub(self) -> bool:
        return "/" in self.source and not Path(self.source).exists() and _kind(Path(self.source)) not in _KINDS

    def documents(self, mine: Mine = lambda index: True, stop: int | None = None) -> Iterator[Document | LeftOut]:
        """The documents whose place `mine` accepts, in order; blank lines of a text file are none.

        Args:
            mine: Asked for each document before it is decoded.
            stop: Read only those before this place.

        Raises:
            InputError: There is no such corpus, or a column is missing.
        """
        path = Path(self.source)
        kind = _kind(path)
        if self.whole_file and kind not in _TEXT:
            raise InputError(
                f"whole_file (--whole-file) takes a text file as one document, and {self.source} is none "
                f"({', '.join(_TEXT)}). Leave it out."
            )
        if self._may_be_on_the_hub:
            return self._rows(self._of_the_hub(), mine, stop)
        if not path.exists():
            raise InputError(
                f"There is no corpus {self.source!r}: not a file here, and not a hub id (owner/name). Give a "
                f"file ({', '.join(_KINDS)}) or a hub id."
            )
        if path.is_dir() or kind not in _KINDS:
            raise InputError(f"{self.source} is not a corpus; expected a file that ends in {', '.join(_KINDS)} or .gz.")
        if kind == ".parquet":
            return self._parquet(path, mine, stop)
        return self._lines(path, kind in _JSON, mine, stop)

    def count(self) -> int | None:
        """How many documents there are, where that can be told quickly; for the remaining time alone."""
        path = Path(self.source)
        if not path.is_file() or self.whole_file:
            return None
        if _kind(path) == ".parquet":
            from pyarrow import ArrowInvalid, parquet

            try:
                return int(parquet.read_metadata(path).num_rows)
            except (ArrowInvalid, OSError):
                return None  # `documents` says what is wrong with it
        if path.suffix.lower() == ".gz" or path.stat().st_size > _COUNTED_BYTES:
            return None
        with path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)

    def _lines(self, path: Path, as_json: bool, mine: Mine, stop: int | None) -> Iterator[Document | LeftOut]:
        if self.category is not None and not as_json:
            raise InputError(f"{path} has no columns, so there is no category {self.category!r}. Leave it out.")
        try:
            with _opened(path) as file:
                lines = [file.read()] if self.whole_file else file
                index = -1
                for line in lines:
                    if not line.strip():
                        continue
                    index += 1
                    if index == stop:
                        return
                    if mine(index):
                        yield self._line(index, line, as_json)
        except (OSError, EOFError) as error:
            raise InputError(f"{path} cannot be read to its end: {error}. Copy or download it again.") from error

    def _line(self, index: int, line: bytes, as_json: bool) -> Document | LeftOut:
        try:
            text = line.decode("utf-8-sig" if index == 0 else "utf-8")
            if not as_json:
                return Document(index, text.strip("\r\n"), "")
            row = json.loads(text)
        except UnicodeDecodeError as error:
            return LeftOut(index, f"not UTF-8 at byte {error.start}")
        except ValueError as error:
            return LeftOut(index, f"not JSON: {error}")
        return self._document(index, row)

    def _parquet(self, path: Path, mine: Mine, stop: int | None) -> Iterator[Document | LeftOut]:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} cannot be read as parquet: {_first_line(error)}") from error
        with file:
            columns = {name for name in self._columns(file.schema_arrow.names) if name is not None}
            index = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                places = range(index, index + count if stop is None else min(index + count, stop))
                if not any(map(mine, places)):
                    index += count
                    continue
                try:
                    rows = file.read_row_group(group, columns=sorted(columns)).to_pylist()
                except (pyarrow.ArrowException, OSError) as error:
                    reason = f"row group {group} is corrupt: {_first_line(error)}"
                    for place in filter(mine, places):
                        yield LeftOut(place, reason)
                else:
                    for place, row in zip(places, rows, strict=False):
                        if mine(place):
                            yield self._document(place, row)
                index += count

    def _of_the_hub(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.source, split=self.split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:  # what datasets and the hub's client raise
            raise InputError(
                f"{self.source!r} is no file here, and cannot be had from the hub: {_first_line(error)} "
                "Check the spelling and the network, or give a file."
            ) from error

    def _rows(self, rows: Iterable[Any], mine: Mine, stop: int | None) -> Iterator[Document | LeftOut]:
        for index, row in enumerate(rows):
            if index == stop:
                return
            if mine(index):
                yield self._document(index, row)

    def _document(self, index: int, row: Any) -> Document | LeftOut:
        if not isinstance(row, dict):
            return LeftOut(index, "no object with columns")
        if index == 0:
            self._columns(list(row))
        column, category = self._names(list(row))
        if column is None or (category is not None and category not in row):
            return LeftOut(index, f"has only the columns {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            return LeftOut(index, "has no text" if text is None or isinstance(text, str) else "its text is no string")
        return Document(index, text, "" if category is None else str(row[category]))

    def _names(self, present: list[str]) -> tuple[str | None, str | None]:
        named = (self.column,) if self.column is not None else _COLUMNS
        return next((name for name in named if name in present), None), self.category

    def _columns(self, present: list[str]) -> tuple[str, str | None]:
        """The columns to read.

        Raises:
            InputError: One is not there; the message lists those that are.
        """
        column, category = self._names(present)
        has = f"{self.source} has the columns {', '.join(present) or '(none)'}"
        if column is None:
            wanted = repr(self.column) if self.column is not None else f"one of {', '.join(_COLUMNS)}"
            raise InputError(f"{has}, not {wanted}. Name the one with the text: --column {(present or ['text'])[0]}.")
        if category is not None and category not in present:
            raise InputError(f"{has}, not {category!r}. Name the one with the category, or leave --category out.")
        return column, category


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
