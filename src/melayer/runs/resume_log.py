"""A resume log: what is finished of a long measurement, a line each in a file, so that the same call goes on there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from melayer.errors import InputError
from melayer.runs import jsonl

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Key = TypeVar("Key")
Item = TypeVar("Item", bound="DataclassInstance")


@dataclass(frozen=True)
class Entries(Generic[Key, Item]):
    """How one kind of measurement keeps what is finished."""

    measurement: str
    """Its name, for messages and the file's first line."""
    item: str
    """What an item is called in its line."""
    read: Callable[[dict[str, Any]], Item]
    """Makes an item of what `asdict` and JSON made of it."""
    key: Callable[[Item], Key]
    """By what an item is looked up."""


@dataclass(eq=False)
class ResumeLog(Generic[Key, Item]):
    """The finished items of a measurement with what was noted, in memory and, if it has a path, in a file."""

    entries: Entries[Key, Item]
    path: Path | None = None
    items: dict[Key, Item] = field(default_factory=dict)
    notes: dict[Key, list[str]] = field(default_factory=dict)

    @classmethod
    def opened(
        cls, entries: Entries[Key, Item], path: str | Path | None, depends_on: Mapping[str, Any]
    ) -> ResumeLog[Key, Item]:
        """What the file holds; it is made if it is missing, and a last line that was cut off is dropped.

        Args:
            entries: How the measurement keeps its items.
            path: The file; None keeps them in memory alone.
            depends_on: What the figures depend on; a file of figures that depend on something else is refused.

        Raises:
            InputError: The file's figures depend on something else, or it is of no such measurement.
            OutputError: It cannot be read or written.
        """
        if path is None:
            return cls(entries)
        log = cls(entries, Path(path))
        for item, notes in log._lines(Path(path), depends_on):
            log._take(item, notes)
        return log

    def add(self, item: Item, notes: Sequence[str]) -> None:
        """Keeps what is finished, on the disk before this returns.

        Raises:
            OutputError: It cannot be written.
        """
        self._take(item, notes)
        if self.path is not None:
            with jsonl.keeping(self.entries.measurement, self.path):
                jsonl.append(self.path, [{self.entries.item: asdict(item), "notes": list(notes)}])

    def notes_of(self, keys: Sequence[Key]) -> Iterator[str]:
        """What was noted at these items, in their order."""
        return (note for key in keys for note in self.notes[key])

    def _take(self, item: Item, notes: Sequence[str]) -> None:
        key = self.entries.key(item)
        self.items[key], self.notes[key] = item, list(notes)

    def _lines(self, path: Path, depends_on: Mapping[str, Any]) -> list[tuple[Item, list[str]]]:
        what, read = self.entries.measurement, self.entries.read
        # As JSON holds it, in which a tuple is a list.
        wanted, head_key = json.loads(json.dumps(dict(depends_on))), f"{what.replace('-', '_')}_of"
        with jsonl.keeping(what, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = jsonl.mend(path)
            if len(lines) < 2:  # nothing is finished, so that nothing can be lost
                path.write_bytes(b"")
                jsonl.append(path, [{head_key: wanted}])
                return []
        try:
            head, *values = map(json.loads, lines)
            found = dict(head[head_key])
            finished = [(read(value[self.entries.item]), list(value["notes"])) for value in values]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no {what} that can be read. Give another place, or remove it.") from error
        differing = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        if differing:
            raise InputError(
                f"{path} is of another {what}: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}. "
                "Give another place, or remove it."
            )
        return finished
