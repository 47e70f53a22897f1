"""What an evaluation keeps: every answer as it is given, for these settings and no others, in one process or many."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from melayer.errors import InputError
from melayer.evaluation.harness import Item
from melayer.evaluation.result import StoredAnswer
from melayer.evaluation.settings import EvalSettings, SharedSettings, TaskSettings
from melayer.runs import atomic, jsonl, ours, records
from melayer.runs.json_text import json_text, writable
from melayer.runs.processes import Group

FILE = "eval.jsonl"
"""Where the answers are kept, in the directory of a run."""

Key = tuple[str, str, str]  # task, variant, item

_HEAD = "eval_of"
_TODO = "Give another place, or remove it."
_RANK = "eval.rank*.jsonl"


class _KeptModel(TypedDict):
    """Whose answers they are."""

    name: str
    fingerprint: str
    dtype: str


class _KeptShared(TypedDict):
    """What all answers of a file have in common, as its page shows it."""

    model: _KeptModel
    chat: bool
    batch_size: int
    device: str
    versions: dict[str, str]


class _KeptSettings(TypedDict):
    """As a file has them; a newer version may say more."""

    shared: _KeptShared
    tasks: dict[str, TaskSettings]
    variants: dict[str, Any]


@dataclass(eq=False)
class Store:
    """The answers, in memory and, a line each, in a file; beside the first process each one has a file of its own."""

    path: Path | None
    settings: EvalSettings
    group: Group
    records: dict[Key, StoredAnswer] = field(default_factory=dict)
    known: frozenset[Key] = frozenset()
    """Those that were there when it was opened."""

    @classmethod
    def opened(
        cls,
        directory: Path | None,
        settings: EvalSettings,
        group: Group,
        items: Mapping[str, Sequence[Item]] | None = None,
    ) -> Store:
        """What the directory holds of these settings.

        Args:
            directory: Where answers are kept; None for memory alone.
            settings: All that they depend on.
            group: The processes that answer.
            items: What is asked, by task: kept answers have to be to these.

        Raises:
            InputError: It holds answers of other settings, or to other questions.
            OutputError: It is not ours, or cannot be read or written.
        """
        store = cls(None, writable(settings), group)
        if directory is None:
            return store
        main = directory / FILE
        store.path = main if group.rank == 0 else directory / _RANK.replace("*", str(group.rank))
        with jsonl.keeping("answers", main):
            atomic.require_writable(directory)
            found = [main, *sorted(directory.glob(_RANK))] if group.rank == 0 else []
            ours.require(found)
            files = [file for file in found if ours.is_there(file)]
        for file in files:
            kept, answers = cls.read(file)
            if answers:  # else nothing can be mixed, and nothing lost
                store._agree(kept, file)
                store.records |= answers
        store.check(items or {})
        with jsonl.keeping("answers", main):
            if files:
                store._write(main, store.records.values())
            for file in files:
                if file != main:
                    file.unlink()
        # The first process alone reads; the others learn from it what is there, and begin files of their own.
        store.records = {key_of(record): record for record in group.gather(list(store.records.values()))}
        store.known = frozenset(store.records)
        return store

    @staticmethod
    def read(path: Path) -> tuple[EvalSettings, dict[Key, StoredAnswer]]:
        """The settings and the answers of a file.

        Raises:
            InputError: It holds none, or not what was written.
            OutputError: It cannot be read.
        """
        said = f"{path} holds no evaluation that can be read"
        lines = jsonl.read(path, said, _TODO)
        head, *rows = lines.values or [{}]
        if head.keys() != {_HEAD}:
            raise InputError(f"{said}: it does not begin with {_HEAD!r}. {_TODO}")
        records.parse(json_text(head[_HEAD]), _KeptSettings, f"{said}: line 1", _TODO)
        settings: EvalSettings = head[_HEAD]  # with what a newer version may say beside it
        answers = {}
        for number, row in enumerate(rows, start=2):
            answer = _answer(row, settings["tasks"], f"{said}: line {number}")
            answers[key_of(answer)] = answer
        return settings, answers

    def _own(self) -> list[StoredAnswer]:
        """What this process has answered."""
        return [record for key, record in self.records.items() if key not in self.known]

    def _write(self, path: Path, answers: Iterable[StoredAnswer]) -> None:
        jsonl.replace(path, itertools.chain([{_HEAD: self.settings}], answers))

    def _agree(self, kept: EvalSettings, file: Path) -> None:
        """Old answers are used only where all that they depend on is the same; other tasks and variants stay."""
        old, new = (_without_name(settings["shared"]) for settings in (kept, self.settings))
        differing = sorted(key for key in old | new if old.get(key) != new.get(key))
        own = self.settings
        for part, old_part, new_part in (
            ("task", kept["tasks"], own["tasks"]),
            ("variant", kept["variants"], own["variants"]),
        ):
            differing += [
                f"{part} {name}"
                for name, about in old_part.items()
                if _chosen(new_part.get(name, about)) != _chosen(about)
            ]
        if differing:
            raise InputError(
                f"{file} holds answers of another run: {', '.join(differing)} "
                f"differ{'s' if len(differing) == 1 else ''}. Give another place, or remove it."
            )
        own["tasks"], own["variants"] = {**kept["tasks"], **own["tasks"]}, {**kept["variants"], **own["variants"]}

    def check(self, items: Mapping[str, Sequence[Item]]) -> None:
        """Raises InputError where a kept answer is to another question."""
        asked = {(task, item.key): item.prompt_hash for task, found in items.items() for item in found}
        for (task, _, key), record in self.records.items():
            if asked.get((task, key), record["prompt"]) != record["prompt"]:
                raise InputError(
                    f"The stored answer to {key} is to another question. Give another place, or remove it."
                )

    def add(self, records: Iterable[StoredAnswer]) -> None:
        """Keeps a batch, on the disk before the next one begins."""
        records = [writable(record) for record in records]
        self.records |= {key_of(record): record for record in records}
        if self.path is not None:
            with jsonl.keeping("answers", self.path):
                if ours.is_there(self.path):
                    jsonl.append(self.path, records)
                else:  # the first ones, or somebody has removed it
                    own = self.records.values() if self.group.rank == 0 else self._own()
                    self._write(self.path, own)

    def finish(self, items: Mapping[str, Sequence[Item]], variants: Sequence[str]) -> None:
        """All answers in every process; the file in the items' order, so that equal runs have equal files."""
        own = list(self.records.values())
        self.records |= {key_of(record): record for record in self.group.gather(own)}
        if self.path is None:
            return
        order = [(task, label, item.key) for task, found in items.items() for item in found for label in variants]
        others = sorted(self.records.keys() - set(order), key=lambda key: (key[0], order_of(key[2]), key[1]))
        with jsonl.keeping("answers", self.path):
            if self.group.rank == 0:
                self._write(self.path, [self.records[key] for key in [*order, *others]])
        # Their own files go once the first process has written all of them.
        self.group.gather([None])
        if self.group.rank:
            self.path.unlink(missing_ok=True)


def _answer(row: Mapping[str, Any], tasks: Mapping[str, TaskSettings], said: str) -> StoredAnswer:
    """A line as an answer to one of the tasks, with scores that their metrics can be counted by."""
    answer = records.parse(json_text(row), StoredAnswer, said, _TODO)
    if not row.keys() <= StoredAnswer.__annotations__.keys():
        raise InputError(f"{said}: it has fields that this version does not know. {_TODO}")
    if not order_of(answer["item"])[1] >= 0:
        raise InputError(f"{said}: item is {answer['item']!r}; expected a task and a place, as gsm8k/3. {_TODO}")
    if answer["task"] not in tasks:
        raise InputError(f"{said}: its task {answer['task']!r} is not among the settings. {_TODO}")
    for metric, counted in tasks[answer["task"]]["metrics"].items():
        score = answer["scores"].get(metric)
        if metric in answer["scores"] and counted["kind"] != "other" and not _is_pair(score):
            raise InputError(f"{said}: {metric} is {score!r}; expected a value and a size. {_TODO}")
    return answer


def _is_pair(score: Any) -> bool:
    """Whether it is two numbers."""
    return isinstance(score, list) and len(score) == 2 and all(type(value) in (int, float) for value in score)


def _without_name(shared: SharedSettings) -> dict[str, Any]:
    """The same weights may lie elsewhere: they are told by their fingerprint."""
    model = {key: value for key, value in shared["model"].items() if key != "name"}
    return {**shared, "model": model}


def _chosen(about: Any) -> Any:
    """What is set in a description: an option that a newer version has, and that is None, changes nothing."""
    return {key: value for key, value in about.items() if value is not None} if isinstance(about, dict) else about


def key_of(record: StoredAnswer) -> Key:
    """What an answer is found by."""
    return record["task"], record["variant"], record["item"]


def file_of(where: Path) -> Path:
    """The file of a stored run, given itself or its directory."""
    path = where / FILE if where.is_dir() else where
    if not path.is_file():
        raise InputError(f"There is no evaluation at {where}: expected a directory with {FILE}, or such a file.")
    return path


def order_of(key: str) -> tuple[str, int]:
    """Items sorted by task and place."""
    task, _, place = key.rpartition("/")
    return task, int(place) if place.isdecimal() else -1
