"""Whether a row of a benchmark can be asked and scored: what lm-eval would stumble over is left out beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from melayer.data.documents import checked_text, kind_of
from melayer.data.entries import BadRowError
from melayer.errors import reason
from melayer.evaluation.punkt import provide_punkt

Row = dict[str, Any]
LETTERS = "ABCD"
LABELS = ("safe", "unsafe")
"""What XSTest says of a prompt."""


def checked_row(name: str, fields: tuple[str, ...], row: Any) -> Row:
    """The fields of a benchmark's row that are asked and scored, each of its type.

    Args:
        name: The benchmark.
        fields: What its rows have; others are left away, since rows of one file may have them of several types.
        row: A row of its file.

    Raises:
        BadRowError: A field is missing, or is not what the benchmark's rules take.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"{kind_of(row)} and no object with fields")
    for field in fields:
        if field not in row:
            raise BadRowError(f"has no field {field!r}")
    return _CHECKS[name]({field: row[field] for field in fields})


def _texts(*fields: str) -> Callable[[Row], Row]:
    def check(row: Row) -> Row:
        for field in fields:
            checked_text(row[field], f"its {field}")
        return row

    return check


def _math500(row: Row) -> Row:
    _texts("problem", "solution")(row)
    if not isinstance(row["answer"], str):
        raise BadRowError(f"its answer is {kind_of(row['answer'])} and no string")
    return row  # whether its solution has a box, the task's own preparation tells


def _aime24(row: Row) -> Row:
    checked_text(row["Problem"], "its Problem")
    answer = row["Answer"]
    if isinstance(answer, bool) or not isinstance(answer, (int, str)) or not str(answer).strip():
        raise BadRowError(f"its Answer is {kind_of(answer)} and neither a whole number nor a string")
    return {**row, "Answer": str(answer)}


def _mmlu(row: Row) -> Row:
    _texts("subject", "question")(row)
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, (list, tuple)) or len(choices) != len(LETTERS):
        raise BadRowError(f"its choices are {kind_of(choices)}; expected a list of {len(LETTERS)}")
    for choice in choices:
        checked_text(choice, "one of its choices")
    if isinstance(answer, str) and answer in LETTERS and len(answer) == 1:
        answer = LETTERS.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(LETTERS):
        raise BadRowError(f"its answer is {str(answer)[:20]!r}; expected 0 to {len(LETTERS) - 1}")
    return {**row, "choices": list(choices), "answer": answer}


@functools.cache
def _instructions() -> dict[str, Any]:
    """IFEval's checkers by name; their module would download what `punkt` provides."""
    provide_punkt()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    return dict(INSTRUCTION_DICT)


def _ifeval(row: Row) -> Row:
    known = _instructions()
    checked_text(row["prompt"], "its prompt")
    names, options = row["instruction_id_list"], row["kwargs"]
    if isinstance(row["key"], bool) or not isinstance(row["key"], int):
        raise BadRowError(f"its key is {kind_of(row['key'])} and no number")
    if not isinstance(names, list) or not isinstance(options, list) or len(names) != len(options) or not names:
        raise BadRowError("its instruction_id_list and kwargs are no lists of the same length")
    for name, given in zip(names, options, strict=True):
        if not isinstance(name, str) or name not in known:
            raise BadRowError(f"there is no instruction {str(name)[:60]!r}")
        if not isinstance(given, Mapping):
            raise BadRowError(f"the kwargs of {name} are {kind_of(given)} and no object")
        try:
            known[name](name).build_description(**{key: value for key, value in given.items() if value})
        except Exception as error:
            raise BadRowError(f"the kwargs of {name} are refused: {reason(error)}") from error
    return row


def _xstest(row: Row) -> Row:
    checked_text(row["prompt"], "its prompt")
    if row["label"] not in LABELS:
        raise BadRowError(f"its label is {str(row['label'])[:40]!r}; expected {' or '.join(LABELS)}")
    return {**row, "id": str(row["id"])}


_CHECKS: dict[str, Callable[[Row], Row]] = {
    "gsm8k": _texts("question", "answer"),
    "math500": _math500,
    "aime24": _aime24,
    "mmlu": _mmlu,
    "ifeval": _ifeval,
    "wikitext2": _texts("page"),
    "xstest": _xstest,
}
