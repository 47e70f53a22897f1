"""A resume log: what is finished of a long measurement, a line each in a file, so that the same call goes on there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from melayer.errors import InputError
from melayer.runs import atomic, jsonl, ours, records
from melayer.runs.json_text import json_text, writable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Key = TypeVar("Key")
Item = TypeVar("Item", bound="DataclassInstance")

_TODO = "Give another place, or remove it."


@dataclass(frozen=True)
class Entries(Generic[Key, Item]):
    """How one kind of measurement keeps what is finished."""

    measurement: str
    """Its name, for messages and the file's first line."""
    item: str
    """What an item is called in its line."""
    kind: type[Item]
    """What an item is: a dataclass, whose fields a line has to have, each of its type."""
    key: Callable[[Item], Key]
    """By what an item is looked up."""

    @property
    def head(self) -> str:
        """The field of the file's first line, which says what the figures depend on."""
        return f"{self.measurement.replace('-', '_')}_of"


@dataclass(eq=False)
class ResumeLog(Generic[Key, Item]):
    """The finished items of a measurement with what was noted, in memory and, if it has a path, in a file."""

    entries: Entries[Key, Item]
    path: Path | None = None
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    items: dict[Key, Item] = field(default_factory=dict)
    notes: dict[Key, list[str]] = field(default_factory=dict)
    settled: bool = False
    """Whether lines can be added to the file. At first it is written anew: it is not there yet, or its last line does
    not end, or it has another name, or no checksums."""

    @classmethod
    def opened(
        cls, entries: Entries[Key, Item], path: str | Path | None, depends_on: Mapping[str, Any]
    ) -> ResumeLog[Key, Item]:
        """What the file holds, without a last line that was cut off.

        Nothing is changed before the first item is added, and then only if all of it was of this measurement.

        Args:
            entries: How the measurement keeps its items.
            path: The file; None keeps them in memory alone.
            depends_on: What the figures depend on; a file of figures that depend on something else is refused.

        Raises:
            InputError: The file's figures depend on something else, or it is of no such measurement.
            OutputError: It is not ours, or cannot be read or written.
        """
        if path is None:
            return cls(entries)
        log = cls(entries, Path(path), writable(dict(depends_on)))
        log._read(Path(path))
        return log

    def add(self, item: Item, notes: Sequence[str]) -> None:
        """Keeps what is finished, on the disk before this returns.

        Raises:
            OutputError: It cannot be written.
        """
        self._take(item, notes)
        if self.path is not None:
            with jsonl.keeping(self.entries.measurement, self.path):
                if self.settled and ours.is_there(self.path):
                    jsonl.append(self.path, [self._line(self.entries.key(item))])
                else:
                    lines = map(self._line, self.items)
                    jsonl.replace(self.path, [{self.entries.head: self.depends_on}, *lines])
                    self.settled = True

    def notes_of(self, keys: Sequence[Key]) -> Iterator[str]:
        """What was noted at these items, in their order."""
        return (note for key in keys for note in self.notes[key])

    def _take(self, item: Item, notes: Sequence[str]) -> None:
        key = self.entries.key(item)
        self.items[key], self.notes[key] = item, list(notes)

    def _line(self, key: Key) -> dict[str, Any]:
        return {self.entries.item: asdict(self.items[key]), "notes": self.notes[key]}

    def _read(self, path: Path) -> None:
        what = self.entries.measurement
        with jsonl.keeping(what, path):
            atomic.require_writable(path.parent)
            ours.require([path])
            there = ours.is_there(path)
        said = f"{path} holds no {what} that can be read"
        lines = jsonl.read(path, said, _TODO)
        if there and not lines.values and not lines.rest.startswith(f'{{"{self.entries.head}": {{'.encode()):
            raise InputError(f"{said}: it does not begin with {self.entries.head!r}. {_TODO}")
        head, *values = lines.values or [{self.entries.head: self.depends_on}]
        if head.keys() != {self.entries.head} or not isinstance(head[self.entries.head], dict):
            raise InputError(f"{said}: it does not begin with {self.entries.head!r}. {_TODO}")
        found = head[self.entries.head]
        wanted = self.depends_on
        differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        if differing and values:  # else nothing is finished, so that nothing can be lost
            raise InputError(
                f"{path} is of another {what}: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}. "
                f"{_TODO}"
            )
        for number, value in enumerate(values, start=2):
            self._take(*self._item(value, f"{said}: line {number}"))

    def _item(self, value: dict[str, Any], said: str) -> tuple[Item, list[str]]:
        """What a line holds."""
        if value.keys() != {self.entries.item, "notes"}:
            raise InputError(f"{said}: expected {self.entries.item!r} and 'notes'. {_TODO}")
        item = records.parse(json_text(value[self.entries.item]), self.entries.kind, said, _TODO)
        if writable(asdict(item)) != value[self.entries.item]:
            raise InputError(f"{said}: it has fields that this version does not know, or lacks some. {_TODO}")
        return item, records.parse(json_text(value["notes"]), list[str], f"{said}: notes", _TODO)
