"""A corpus of any size as a stream of documents: text, JSON lines or parquet, or a data set of the hub."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melayer.errors import InputError, first_line

_TEXT, _JSON = (".txt", ".text", ".raw", ".md"), (".jsonl", ".ndjson", ".json")
_KINDS = (*_TEXT, *_JSON, ".parquet")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_COLUMNS = ("text", "content", "document", "body")
_COUNTED_BYTES = 2**30
"""Lines of larger files are not counted beforehand: that would be reading them twice."""
_ROWS = 1024  # of a parquet file at a time
MAX_NAMED = 20
"""How many of the documents left out are named; all are counted."""


Mine = Callable[[int], bool]
"""Whether the document at this place is to be read."""


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
    """A file (.txt, .jsonl or .parquet; the first two also as .gz and .zst), a directory of them, a pattern
    (`shards/*.jsonl.zst`), or a hub id."""
    column: str | None = None
    """The column with the text; by default the usual names."""
    category: str | None = None
    """A column by which documents are kept apart."""
    split: str = "train"
    """Of a data set of the hub."""
    whole_file: bool = False
    """A text file is one document, not one a line."""

    def check(self) -> None:
        """Raises InputError for whatever the first document and the ends of the files tell before a model is loaded."""
        if self.is_of_the_hub:
            return
        for path in self.files:
            if _kind(path) == ".parquet":
                _n_rows(path)
        next(self.documents(stop=1), None)

    @property
    def is_of_the_hub(self) -> bool:
        """Whether the source can only be a hub id."""
        path = Path(self.source)
        return "/" in self.source and not path.exists() and _kind(path) not in _KINDS and not _is_pattern(self.source)

    @property
    def files(self) -> list[Path]:
        """The files, by name; the documents are numbered through all of them.

        Raises:
            InputError: There is none, or one is of no known kind.
        """
        path = Path(self.source)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) in _KINDS)
            kinds = sorted({_kind(file) for file in found})
            if len(kinds) > 1:
                raise InputError(
                    f"{self.source} holds files of several kinds ({', '.join(kinds)}), and which are the corpus cannot "
                    f"be told. Give a pattern: {path / f'*{kinds[-1]}'}."
                )
        elif _is_pattern(self.source) and not path.exists():
            # Path.glob takes no absolute pattern.
            found = sorted(file for name in glob.iglob(self.source, recursive=True) if (file := Path(name)).is_file())  # noqa: PTH207
        elif path.exists():
            found = [path]
        else:
            raise InputError(
                f"There is no corpus {self.source!r}: not a file here, and not a hub id (owner/name). Give a "
                f"file ({', '.join(_KINDS)}), a directory of them, a pattern or a hub id."
            )
        odd = [file for file in found if _kind(file) not in _KINDS]
        if odd or not found:
            raise InputError(
                f"{odd[0] if odd else self.source} is not a corpus; expected files that end in {', '.join(_KINDS)}, or "
                f"in {' or '.join(_COMPRESSED)} after that."
            )
        return found

    def documents(self, mine: Mine = lambda index: True, stop: int | None = None) -> Iterator[Document | LeftOut]:
        """The documents whose place `mine` accepts, in order; blank lines of a text file are none.

        Args:
            mine: Asked for each document before it is decoded.
            stop: Read only those before this place.

        Raises:
            InputError: There is no such corpus, or a column is missing.
        """
        if self.is_of_the_hub:
            if self.whole_file:
                raise self._not_whole(self.source)
            return self._rows(self._of_the_hub(), mine, stop)
        files = self.files
        for path in files:
            if self.whole_file and _kind(path) not in _TEXT:
                raise self._not_whole(str(path))
            if self.category is not None and _kind(path) in _TEXT:
                raise InputError(f"{path} has no columns, so there is no category {self.category!r}. Leave it out.")
        return self._of_files(files, mine, stop)

    def _not_whole(self, name: str) -> InputError:
        return InputError(
            f"whole_file (--whole-file) takes a text file as one document, and {name} is none ({', '.join(_TEXT)}). "
            "Leave it out."
        )

    def count(self) -> int | None:
        """How many documents there are, where that can be told quickly; for the remaining time alone."""
        if self.is_of_the_hub:
            return None
        files = self.files
        if self.whole_file:
            return len(files)
        lines = [path for path in files if _kind(path) != ".parquet"]
        if any(path.suffix.lower() in _COMPRESSED for path in lines):
            return None
        if sum(path.stat().st_size for path in lines) > _COUNTED_BYTES:
            return None
        total = sum(_n_rows(path) for path in files if path not in lines)
        for path in lines:
            with path.open("rb") as file:
                total += sum(bool(line.strip()) for line in file)
        return total

    def _of_files(self, files: Iterable[Path], mine: Mine, stop: int | None) -> Iterator[Document | LeftOut]:
        begin = 0
        for path in files:
            if stop is not None and begin >= stop:
                return
            of_file = self._parquet if _kind(path) == ".parquet" else self._lines
            begin = yield from of_file(path, begin, mine, stop)

    def _lines(self, path: Path, begin: int, mine: Mine, stop: int | None) -> Generator[Document | LeftOut, None, int]:
        """The documents of a file whose first one has the number `begin`; returns that of the next file's first one."""
        as_json, index = _kind(path) in _JSON, begin
        try:
            with _opened(path) as file:
                for line in [file.read()] if self.whole_file else file:
                    if not line.strip():
                        continue
                    if index == stop:
                        return index
                    if index == begin and _kind(path) == ".json":
                        _check_lines(path, line)
                    if mine(index):
                        yield self._line(index, line, as_json, first=index == begin)
                    index += 1
        except (OSError, EOFError) as error:
            raise InputError(f"{path} cannot be read to its end: {error}. Copy or download it again.") from error
        return index

    def _line(self, index: int, line: bytes, as_json: bool, first: bool) -> Document | LeftOut:
        try:
            text = line.decode("utf-8-sig" if first else "utf-8")
            if not as_json:
                return Document(index, text.strip("\r\n"), "")
            row = json.loads(text)
        except UnicodeDecodeError as error:
            return LeftOut(index, f"not UTF-8 at byte {error.start}")
        except ValueError as error:
            return LeftOut(index, f"not JSON: {error}")
        return self._document(index, row)

    def _parquet(
        self, path: Path, begin: int, mine: Mine, stop: int | None
    ) -> Generator[Document | LeftOut, None, int]:
        """As `_lines`."""
        import pyarrow

        with _as_parquet(path) as file:
            present = file.schema_arrow.names
            column, category = self._columns(present) if begin == 0 else self._names(present)
            if column not in present or category not in (None, *present):
                for place in filter(mine, _until(stop, begin, file.metadata.num_rows)):
                    yield LeftOut(place, f"{path.name} has only the columns {', '.join(present)}")
                return begin + int(file.metadata.num_rows)
            wanted = [name for name in present if name in (column, category)]
            index = begin
            for group in range(file.num_row_groups):
                places = _until(stop, index, file.metadata.row_group(group).num_rows)
                index += file.metadata.row_group(group).num_rows
                if not any(map(mine, places)):
                    continue
                read = places.start
                try:
                    # A row group may be larger than the memory.
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted):
                        rows = batch.to_pylist()
                        for place, row in zip(range(read, places.stop), rows, strict=False):
                            if mine(place):
                                yield self._document(place, row)
                        read += len(rows)
                except (pyarrow.ArrowException, OSError) as error:
                    reason = f"row group {group} of {path.name} is corrupt: {first_line(error)}"
                    for place in filter(mine, range(read, places.stop)):
                        yield LeftOut(place, reason)
            return index

    def _of_the_hub(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.source, split=self.split, streaming=True, trust_remote_code=False)
        except _of_datasets() as error:
            raise InputError(
                f"{self.source!r} is no file here, and cannot be had from the hub: {first_line(error)} "
                "Check the spelling and the network, or give a file."
            ) from error

    def _rows(self, rows: Iterable[Any], mine: Mine, stop: int | None) -> Iterator[Document | LeftOut]:
        index = 0
        try:
            for row in rows:
                if index == stop:
                    return
                if mine(index):
                    yield self._document(index, row)
                index += 1
        except _of_datasets() as error:
            raise InputError(
                f"{self.source} cannot be read on from document {index}: {first_line(error)} The same command goes on "
                "from what was kept with --out."
            ) from error

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
    if suffixes[-1:] and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_pattern(source: str) -> bool:
    return any(character in source for character in "*?[")


def _opened(path: Path) -> io.BufferedReader:
    how = _COMPRESSED.get(path.suffix.lower())
    if how is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=how), 1 << 20)


def _check_lines(path: Path, line: bytes) -> None:
    """A file that ends in .json alone may hold lines or one value over many lines."""
    try:
        whole = isinstance(json.loads(line), dict)
    except ValueError:
        whole = False
    if not whole:
        raise InputError(
            f"{path} does not begin with a line that is a JSON object, so it is not one document a line. Write it as "
            ".jsonl: jq -c '.[]'."
        )


def _until(stop: int | None, begin: int, count: int) -> range:
    """So many places from `begin` on, those from `stop` on left out."""
    return range(begin, begin + count if stop is None else max(begin, min(begin + count, stop)))


def _of_datasets() -> tuple[type[Exception], ...]:
    """What datasets and the hub's client raise."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from pyarrow import ArrowException

    return DatasetsError, HTTPError, ArrowException, OSError, ValueError, RuntimeError


def _as_parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def _n_rows(path: Path) -> int:
    with _as_parquet(path) as file:
        return int(file.metadata.num_rows)
