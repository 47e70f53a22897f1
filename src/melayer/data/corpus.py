"""A corpus of any size as a stream of documents: files of any kind that holds texts, or a data set of the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from melayer.data import entries as rows_of_files
from melayer.data.documents import TextColumn
from melayer.data.entries import BadRowError, Entry, Skipped
from melayer.data.files import is_file, is_link, is_there, printable, require_datasets, require_file, shown
from melayer.data.formats import Format, format_of
from melayer.errors import InputError, border

_SUFFIXES = (".txt", ".text", ".md", ".raw", ".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".gz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COUNTED_BYTES = 2**30
"""Lines of larger files are not counted beforehand: that would be reading them twice."""
MAX_NAMED = 20
"""How many of the documents left out are named; all are counted."""
MAX_CATEGORIES = 64
"""How many categories have figures of their own unless told otherwise: each costs some megabytes."""
OTHER = "(other)"
"""The category of documents whose own came too late to have figures of its own."""


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
    """Where it is, and why it cannot be used."""


@dataclass(frozen=True)
class Corpus:
    """Where the documents are, and which of a row's columns matter."""

    source: str
    """A file (text, JSON lines, a JSON list, parquet or CSV, also compressed), a directory of them, a pattern
    (`shards/*.jsonl.zst`), or a hub id."""
    column: str | None = None
    """The column with the text; by default the usual names."""
    category: str | None = None
    """A column by which documents are kept apart."""
    split: str = "train"
    """Of a data set of the hub."""
    whole_file: bool = False
    """A text file is one document, not one a line."""
    max_categories: int = MAX_CATEGORIES
    """The first so many categories in the order of the corpus have figures of their own, all others are `OTHER`."""

    def check(self) -> None:
        """Raises InputError for whatever the files tell before a model is loaded, up to the first document in them.

        Raises:
            InputError: There is no such corpus, a file cannot be read, or none of the rows can be used.
        """
        if self.max_categories < 1:
            raise InputError(f"max_categories is {self.max_categories}; expected at least 1.")
        if self.is_of_the_hub:
            require_datasets(f"{self.source!r} is no file here but a data set of the hub")
            return
        for path, format in self.formats:
            if format.kind == "parquet":
                with rows_of_files.parquet_file(path):
                    pass
        left_out: list[LeftOut] = []
        n_left_out = 0
        for found in self.documents():
            if isinstance(found, Document):
                return
            n_left_out += 1
            left_out = [*left_out, found] if len(left_out) < MAX_NAMED else left_out
        raise InputError(self.nothing(left_out, n_left_out))

    def nothing(self, left_out: Sequence[LeftOut], n_left_out: int) -> str:
        """What is said where no document can be measured."""
        if not n_left_out:
            return f"The corpus {shown(self.source)} holds no document. Give one with text in it."
        first = left_out[0].reason
        todo = "Mend it, or give another"
        if "has the columns" in first and self.category is not None and f"not {self.category!r}" in first:
            todo = "Name the column with the category, or leave --category out"
        elif "has the columns" in first:
            todo = "Name the column with the text: --column NAME"
        elif "not UTF-8" in first:
            todo = "Convert it to UTF-8 first: iconv -f ENCODING -t UTF-8"
        return (
            f"No document of {shown(self.source)} can be measured: {n_left_out:,} "
            f"{'was' if n_left_out == 1 else 'were'} left out, the first because: {first}. {todo}."
        )

    @property
    def is_of_the_hub(self) -> bool:
        """Whether the source can only be a hub id."""
        named = self.source.lower().endswith(_SUFFIXES)
        return bool(_HUB_ID.fullmatch(self.source)) and not named and not is_there(Path(self.source))

    @property
    def files(self) -> list[Path]:
        """The files, by name; the documents are numbered through all of them.

        Raises:
            InputError: There is none, or they are of several kinds.
        """
        return [path for path, _ in self.formats]

    @cached_property
    def formats(self) -> tuple[tuple[Path, Format], ...]:
        """The files with what each is, those that are empty left out.

        Raises:
            InputError: There is none, or they are of several kinds.
        """
        paths = self._paths()
        found = [(path, format) for path in paths if (format := format_of(path, whole=self.whole_file)) is not None]
        by_kind = {format.kind: path for path, format in reversed(found)}
        if len(by_kind) > 1 and len(paths) > 1:
            said = ", ".join(f"{kind} in {shown(path.name)}" for kind, path in by_kind.items())
            raise InputError(
                f"{shown(self.source)} holds files of several kinds ({said}), and which are the corpus cannot be told. "
                f"Give a pattern: {shown(Path(self.source) / '*.jsonl')}."
            )
        return tuple(found)

    def _paths(self) -> list[Path]:
        if not self.source.strip():
            raise InputError("The corpus has an empty name. Give a file, a directory of them, a pattern or a hub id.")
        path = Path(self.source)
        if is_there(path) and path.is_dir():
            with border(f"The directory {shown(path)} cannot be read", "Check its rights."):
                found = sorted(file for file in path.iterdir() if is_file(file) and not file.name.startswith("."))
            if not found:
                raise InputError(f"The directory {shown(path)} holds no file. Give one with texts in it.")
            return found
        if _is_pattern(self.source) and not is_there(path):
            # Path.glob takes no absolute pattern.
            with border(f"The pattern {shown(self.source)} cannot be followed", "Give a file or a directory."):
                found = sorted(file for name in glob.iglob(self.source, recursive=True) if is_file(file := Path(name)))  # noqa: PTH207
            if not found:
                raise InputError(f"No file matches {shown(self.source)}. Give another pattern, a file or a directory.")
            return found
        if not is_there(path) and not is_link(path) and len(self.source) < 200:
            raise InputError(
                f"There is no corpus {printable(self.source)!r}: not a file here, and not a hub id (owner/name). Give "
                "a file of text, JSON lines, parquet or CSV, a directory of them, a pattern or a hub id."
            )
        require_file(path)
        return [path]

    def documents(self, mine: Mine = lambda index: True, stop: int | None = None) -> Iterator[Document | LeftOut]:
        """The documents whose place `mine` accepts, in order; blank lines are none.

        Args:
            mine: Asked for each document before it is decoded.
            stop: Read only those before this place.

        Raises:
            InputError: There is no such corpus, or it cannot be read to its end.
        """
        if self.is_of_the_hub:
            if self.whole_file:
                raise self._not_whole(self.source)
            return _Reading(self, mine, stop).of_rows(self._of_the_hub())
        for path, format in self.formats:
            if self.whole_file and format.kind == "parquet":
                raise self._not_whole(shown(path))
            if self.category is not None and (self.whole_file or format.kind == "text"):
                raise InputError(
                    f"{shown(path)} is text and has no columns, so there is no category {self.category!r}. Leave it "
                    "out."
                )
            if self.column is not None and not self.whole_file and format.kind == "text":
                raise InputError(
                    f"{shown(path)} is text and has no columns, so there is no column {self.column!r}. Leave it out."
                )
        return _Reading(self, mine, stop).of_files()

    def _not_whole(self, name: str) -> InputError:
        return InputError(
            f"whole_file (--whole-file) takes a text file as one document, and {name} is none. Leave it out."
        )

    @property
    def said(self) -> str:
        """How the files are read: of which kind they are, and which column the text is taken from; empty for text."""
        if self.is_of_the_hub or self.whole_file or all(format.kind == "text" for _, format in self.formats):
            return ""
        columns = TextColumn(self.column)
        for path, format in self.formats:
            for entry in rows_of_files.entries(path, format, chosen=columns.chosen):
                try:
                    row = entry.value() if isinstance(entry, Entry) else None
                    columns.text(row)
                except BadRowError:
                    continue
                where = "" if isinstance(row, str) else f", its texts from the column {columns.column_in(row)!r}"
                return f"{shown(Path(self.source).name)} is read as {format.said}{where}."
        return ""

    def count(self) -> int | None:
        """How many documents there are, where that can be told quickly; for the remaining time alone."""
        if self.is_of_the_hub:
            return None
        if self.whole_file:
            return len(self.formats)
        tables = [path for path, format in self.formats if format.kind == "parquet"]
        others = [(path, format) for path, format in self.formats if format.kind != "parquet"]
        lines = all(format.kind in ("text", "JSON lines") for _, format in others)
        compressed = any(format.compressed for _, format in others)
        if not lines or compressed or sum(path.stat().st_size for path, _ in others) > _COUNTED_BYTES:
            return None
        total = sum(rows_of_files.count_lines(path, format) for path, format in others)
        for path in tables:
            with rows_of_files.parquet_file(path) as file:
                total += int(file.metadata.num_rows)
        return total

    def _of_the_hub(self) -> Any:
        datasets = require_datasets(f"{self.source!r} is no file here but a data set of the hub")
        with border(
            f"{self.source!r} is no file here, and cannot be had from the hub",
            "Check the spelling and the network, or give a file.",
        ):
            return datasets.load_dataset(self.source, split=self.split, streaming=True, trust_remote_code=False)


@dataclass(eq=False)
class _Reading:
    """One pass over a corpus."""

    corpus: Corpus
    mine: Mine
    stop: int | None
    own: dict[str, None] = field(default_factory=dict)
    """The categories with figures of their own, so far."""

    def __post_init__(self) -> None:
        """Where the text is."""
        self.columns = TextColumn(self.corpus.column, self.corpus.category)

    def of_files(self) -> Iterator[Document | LeftOut]:
        """The documents of all files, one after the other."""
        begin = 0
        for path, format in self.corpus.formats:
            if self.stop is not None and begin >= self.stop:
                return
            begin = yield from self._of_file(path, format, begin)

    def _of_file(self, path: Path, format: Format, begin: int) -> Generator[Document | LeftOut, None, int]:
        """The documents of a file whose first one has the number `begin`; returns that of the next file's first one."""
        index, name = begin, printable(path.name)

        def needed(places: range) -> bool:
            return self._categories_open() or any(
                self.mine(begin + place) for place in places if self.stop is None or begin + place < self.stop
            )

        found: Iterable[Entry | Skipped]
        if self.corpus.whole_file:
            found = [rows_of_files.whole(path, format)]
        else:
            found = rows_of_files.entries(path, format, chosen=self.columns.chosen, needed=needed)
        for entry in found:
            if index == self.stop:
                return index
            if isinstance(entry, Skipped):
                index += entry.count
                continue
            yield from self._document(index, entry.value, f"{name}, {entry.place}")
            index += 1
        return index

    def of_rows(self, rows: Iterable[Any]) -> Iterator[Document | LeftOut]:
        """The documents of a data set of the hub."""
        index = 0
        source = self.corpus.source
        remaining = iter(rows)
        while index != self.stop:
            with border(
                f"{source} cannot be read on from document {index}",
                "The same command goes on from what was kept with --out.",
            ):
                try:
                    row = next(remaining)
                except StopIteration:
                    return
            yield from self._document(index, partial(_as_it_is, row), f"row {index + 1:,}")
            index += 1

    def _document(self, index: int, value: Callable[[], Any], place: str) -> Iterator[Document | LeftOut]:
        """The document at a place, if it is asked for; whether or not, its category counts for the order of them."""
        mine = self.mine(index)
        if not mine and not self._categories_open():
            return
        try:
            row = value()
            category = self._category(row)
            if mine:
                yield Document(index, self.columns.text(row), category)
        except BadRowError as error:
            if mine:
                yield LeftOut(index, f"{place}: {printable(str(error))[:300]}")

    def _categories_open(self) -> bool:
        """Whether there may be another category with figures of its own.

        While there may, each process looks at every row: which categories are the first of the corpus then does not
        depend on whose turn they are.
        """
        return self.corpus.category is not None and len(self.own) < self.corpus.max_categories

    def _category(self, row: Any) -> str:
        name = self.columns.category_of(row)
        if name in self.own:
            return name
        if self.corpus.category is not None and not self._categories_open():
            return OTHER
        self.own[name] = None
        return name


def _as_it_is(row: Any) -> Any:
    return row


def _is_pattern(source: str) -> bool:
    return any(character in source for character in "*?[")
