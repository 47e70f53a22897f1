"""From a row to a text and its category: which column is taken, and why a row cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from melayer.data.entries import BadRowError
from melayer.data.files import printable

COLUMNS = ("text", "content", "document", "body")
"""Where a text is looked for unless a column is named, in this order."""
MAX_NAMED = 3
"""How many of the rows that cannot be used are named in a note; all are counted."""
MAX_CATEGORY = 200
"""Characters of a category's name at most."""


@dataclass(frozen=True)
class TextColumn:
    """Where in a row the text is, and what it is counted under."""

    column: str | None = None
    """None: the first of `COLUMNS` that the row has."""
    category: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that may hold the text, in order."""
        return COLUMNS if self.column is None else (self.column,)

    def chosen(self, present: Sequence[str]) -> Sequence[str]:
        """Of a table's columns those to read; all where one is missing, so that a message can list them."""
        text = next((name for name in self.names if name in present), None)
        if text is None or self.category not in (None, *present):
            return present
        return [name for name in present if name in (text, self.category)]

    def text(self, row: Any) -> str:
        """The text of a row: of a line, or of an object's column.

        Raises:
            BadRowError: It has none.
        """
        return checked_text(row if isinstance(row, str) else row[self.column_in(row)])

    def column_in(self, row: Any) -> str:
        """The column of a row that holds its text.

        Raises:
            BadRowError: There is none.
        """
        if not isinstance(row, Mapping):
            raise BadRowError(f"{kind_of(row)} and no object with columns")
        name = next((name for name in self.names if name in row), None)
        if name is None:
            wanted = repr(self.column) if self.column is not None else f"one of {', '.join(COLUMNS)}"
            raise BadRowError(f"has the columns {listed(row)}, not {wanted}")
        return name

    def category_of(self, row: Any) -> str:
        """What a row is counted under; empty where no category was asked for, or its column holds none.

        Raises:
            BadRowError: It has no such column, or what is in it is no name.
        """
        if self.category is None:
            return ""
        if not isinstance(row, Mapping) or self.category not in row:
            has = f"has the columns {listed(row)}" if isinstance(row, Mapping) else f"{kind_of(row)} without columns"
            raise BadRowError(f"{has}, not {self.category!r}")
        value = row[self.category]
        if value is None:
            return ""
        if isinstance(value, (list, dict, bytes)):
            raise BadRowError(f"its {self.category} is {kind_of(value)}, and no name")
        name = value if isinstance(value, str) else json.dumps(value) if isinstance(value, bool) else str(value)
        if len(name) > MAX_CATEGORY:
            raise BadRowError(f"its {self.category} has {len(name):,} characters; expected at most {MAX_CATEGORY}")
        require_characters(name, f"its {self.category}")
        return name


@dataclass(eq=False)
class Rejected:
    """The rows of one source that cannot be used: all are counted, the first are named."""

    source: str
    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, why: str) -> None:
        """One more: where it is, and why it cannot be used."""
        self.count += 1
        if len(self.first) < MAX_NAMED:
            self.first.append(printable(why)[:300])

    @property
    def note(self) -> str:
        """What is said of them beside a result; empty where there are none."""
        if not self.count:
            return ""
        more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        rows = "1 row is" if self.count == 1 else f"{self.count:,} rows are"
        return f"{rows} left out of {self.source}: {'; '.join(self.first)}{more}."


def checked_text(value: Any, what: str = "its text") -> str:
    """A text that a tokenizer takes.

    Raises:
        BadRowError: It is none, is blank, or holds what is no character.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRowError("has no text" if what == "its text" else f"{what} is empty")
    if not isinstance(value, str):
        raise BadRowError(f"{what} is {kind_of(value)} and no string")
    require_characters(value, what)
    return value


def require_characters(text: str, what: str) -> None:
    """Raises BadRowError where a text cannot be written as UTF-8: where it has lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{what} holds U+{ord(text[error.start]):04X} at character {error.start:,}, half of a surrogate pair"
        ) from error


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number" if math.isfinite(value) else "no finite number"
    named: dict[str, str] = {"str": "a string", "list": "a list", "dict": "an object", "bytes": "bytes"}
    name = type(value).__name__
    return named.get(name, f"a {name}")


def listed(names: Iterable[Any]) -> str:
    """The first names of columns, as a message can bear them."""
    known = [printable(str(name))[:40] for name in names]
    more = f" and {len(known) - 10:,} more" if len(known) > 10 else ""
    return (", ".join(known[:10]) or "(none)") + more
