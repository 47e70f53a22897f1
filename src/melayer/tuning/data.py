"""From a file or a hub id to rows that a trainer takes: texts, answers, chats, preference pairs, problems."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.data.documents import Rejected, kind_of, listed
from melayer.data.entries import BadRowError
from melayer.errors import InputError, MelayerError, border, reason
from melayer.tuning.rows import Method, Row, Shape
from melayer.tuning.settings import DataSettings
from melayer.tuning.sources import source_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "question", "instruction", "problem", "query"),
    "response": ("completion", "response", "answer", "output", "solution"),
    "text": ("text",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "answer": ("answer", "gold", "solution", "target"),
}
# What each method can be given, in the order in which it is looked for; an optional column has a question mark.
_FORMS: dict[Method, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "response"), ("text",)),
    "dpo": (("prompt?", "chosen", "rejected"),),
    "grpo": (("prompt", "answer"),),
}
GRPO_INSTRUCTION = "Think step by step. End with the final answer on a line of its own, after ####."
"""What a GRPO prompt ends with unless it is told otherwise: what the format reward looks for."""


@dataclass(frozen=True)
class RowOptions:
    """What becomes of the rows, with the names that `melayer.sft`, `dpo` and `grpo` have for it."""

    columns: Mapping[str, str] | None = None
    """Which column plays which part, as {"prompt": "question"}; the rest is found by the usual names."""
    validation: float | str | Path | Dataset | Sequence[Row] | None = None
    """A share of the rows, or other rows, given as the data are."""
    limit: int | None = None
    """Take only the first rows."""
    chat: bool | None = None
    """Whether strings are put into the chat template; None: where there is one."""
    system: str | None = None
    """A system prompt for prompts that are strings."""
    instruction: str | None = None
    """For GRPO, what is added to each prompt; None: GRPO_INSTRUCTION, "" for nothing."""


@dataclass(frozen=True)
class Columns:
    """Which column of the data plays which part."""

    by_role: Mapping[str, str]

    @classmethod
    def find(cls, method: Method, present: Sequence[str], named: Mapping[str, str], source: str) -> Columns:
        """The named columns, and for the rest of a form those that have one of the usual names.

        Raises:
            InputError: A named column is not there, or no form is complete; the message lists the columns.
        """
        has = f"{source} has the columns {listed(present)}"
        roles = {role.rstrip("?") for form in _FORMS[method] for role in form}
        for role, column in named.items():
            if role not in roles:
                raise InputError(f"--columns names {role!r}; for {method} expected some of {', '.join(sorted(roles))}.")
            if column not in present:
                raise InputError(f"--columns says {role}={column}, but {has}.")
        for form in _FORMS[method]:
            wanted = [role.rstrip("?") for role in form]
            if set(named) <= set(wanted):
                found = _by_usual_name(wanted, present, named, has)
                if all(role in found or f"{role}?" in form for role in wanted):
                    return cls(found)
        forms = " or ".join("+".join(role.rstrip("?") for role in form if "?" not in role) for form in _FORMS[method])
        example = ",".join(f"{role.rstrip('?')}=COLUMN" for role in _FORMS[method][-1] if "?" not in role)
        raise InputError(f"{has}, but {method} needs {forms}. Say which they are: --columns {example}.")


def _by_usual_name(roles: Sequence[str], present: Sequence[str], named: Mapping[str, str], has: str) -> dict[str, str]:
    """For each of these parts the column that was named for it, or the one that has a usual name, if there is one."""
    found: dict[str, str] = {}
    for role in roles:
        if role in named:
            found[role] = named[role]
            continue
        candidates = [name for name in _NAMES[role] if name in present and name not in found.values()]
        if len(candidates) > 1:
            raise InputError(
                f"{has}, and {' or '.join(candidates)} may be the {role}. Say which: --columns {role}={candidates[0]}."
            )
        if candidates:
            found[role] = candidates[0]
    return found


@dataclass(frozen=True, eq=False)
class Prepared:
    """Rows in the shape that the method's trainer takes, and what was left out on the way."""

    method: Method
    rows: Dataset
    validation: Dataset | None
    source: str
    columns: Mapping[str, str]
    sha256: str
    """Of the rows, so that a run that goes on can tell whether the data are the same."""
    chat: bool
    assistant_only: bool
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> DataSettings:
        """What a run records of its data."""
        return {
            "source": self.source,
            "columns": dict(self.columns),
            "rows": len(self.rows),
            "validation_rows": 0 if self.validation is None else len(self.validation),
            "left_out": dict(self.left_out),
            "sha256": self.sha256,
            "chat": self.chat,
            "assistant_only": self.assistant_only,
        }


def prepare(
    method: Method,
    data: str | Path | Dataset | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    *,
    max_length: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Prepared:
    """The rows in the shape that the method's trainer takes.

    A prompt that is a string becomes a user's turn, and its answer the assistant's, where the tokenizer has a chat
    template. Rows that are malformed, that have an empty part, or that are longer than `max_length`, are left out,
    counted and said: nothing is cut.

    Args:
        method: Whose rows.
        data: A file, a hub id, a `datasets.Dataset`, or a list of dicts.
        tokenizer: The model's.
        options: What becomes of them.
        max_length: Tokens of a row at most; for GRPO, of a prompt. None: any length.
        seed: Of the draw of validation rows.
        vocabulary: How many tokens the model has, where that is known: a row with another one is left out.

    Raises:
        InputError: Columns are missing, the data cannot be read, or no row is left.
    """
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    if (chat or options.system is not None) and not tokenizer.chat_template:
        raise InputError("This tokenizer has no chat template. Leave chat and the system prompt out.")
    if options.system is not None and not chat:
        raise InputError("A system prompt was given, but the prompts are not put into the chat template. Allow it.")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"limit is {options.limit}; expected at least 1.")
    instruction = GRPO_INSTRUCTION if options.instruction is None else options.instruction
    shape = Shape(method, tokenizer, chat, options.system, instruction, vocabulary)
    trained = _shaped(shape, data, options.columns or {}, options.limit, max_length)
    rows, validation, notes = trained.rows, None, trained.notes
    if isinstance(options.validation, (int, float)):
        rows, validation = _divided(rows, options.validation, seed)
    elif options.validation is not None:
        others = _shaped(shape, options.validation, options.columns or {}, None, max_length)
        validation, notes = others.rows, [*notes, *(f"Validation: {note}" for note in others.notes)]
    return Prepared(
        method=method,
        rows=rows,
        validation=validation,
        source=trained.source,
        columns=trained.columns,
        sha256=_digest([rows] if validation is None else [rows, validation]),
        chat=chat,
        assistant_only="messages" in rows.column_names,
        notes=tuple(dict.fromkeys([*shape.notes, *notes])),
        left_out=trained.left_out,
    )


def _divided(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """The rows to train on, and a share of them to validate with."""
    if not 0 < share < 1 or len(rows) < 2:
        raise InputError(
            f"validation is {share:g} of {len(rows)} rows; expected a share between 0 and 1 of at least two rows, or "
            "a file."
        )
    parts = rows.train_test_split(test_size=max(1, round(share * len(rows))), seed=seed)
    return parts["train"], parts["test"]


@dataclass(frozen=True, eq=False)
class _Shaped:
    """The rows of one source, in the trainer's shape."""

    rows: Dataset
    source: str
    columns: Mapping[str, str]
    notes: list[str]
    left_out: dict[str, int]


def _shaped(shape: Shape, data: Any, named: Mapping[str, str], limit: int | None, max_length: int | None) -> _Shaped:
    from datasets import Dataset

    source = source_of(data)
    columns = Columns.find(shape.method, source.columns, named, source.name).by_role
    empty: list[str] = []
    long: list[str] = []
    malformed = Rejected(source.name)
    kept: list[Row] = []
    total = 0
    for place, value in islice(source.rows(tuple(columns.values())), limit):
        total += 1
        try:
            shaped = shape.row(_row(value()), columns)
            n_tokens = 0 if shaped is None or max_length is None else shape.n_tokens(shaped)
        except MelayerError:
            raise
        except Exception as error:  # noqa: BLE001 - of a template, a tokenizer, a checker: it costs this row alone
            malformed.add(f"{place}: {error if isinstance(error, (ValueError, BadRowError)) else reason(error)}")
            continue
        if shaped is None:
            empty.append(place)
        elif max_length is not None and n_tokens > max_length:
            long.append(place)
        else:
            kept.append(shaped)
    no_use = "are empty, or have no answer that can be checked," if shape.method == "grpo" else "have an empty part"
    said = [
        malformed.note,
        _left_out(empty, total, no_use),
        _left_out(long, total, f"have more than max_length = {max_length} tokens"),
        shape.bos_note,
    ]
    notes = [note for note in said if note]
    if not kept:
        raise InputError(f"No row of {source.name} is left to train on. {' '.join(notes)}")
    left_out = {"empty": len(empty), "too_long": len(long)}
    left_out |= {"malformed": malformed.count} if malformed.count else {}
    with border(f"The rows of {source.name} do not make one table", "Give each part the same type in all rows."):
        return _Shaped(Dataset.from_list(kept), source.name, columns, notes, left_out)


def _row(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRowError(f"{kind_of(value)} and no object with columns")
    return value


def _left_out(places: list[str], of: int, why: str) -> str:
    if not places:
        return ""
    return f"{len(places)} of {of} rows {why} (the first is {places[0]}) and are left out."


def _digest(parts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n\n")
    return digest.hexdigest()
