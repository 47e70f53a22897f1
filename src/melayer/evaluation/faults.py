"""What is wrong with an item of a benchmark, so that it is left out by name and not counted as answered wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LISTED = 3
"""Items named where some are left out."""


def fault(task: Any, doc: Mapping[str, Any], fields: Sequence[str] = ()) -> str | None:
    """Why an item cannot be asked or judged; None where it can.

    lm-eval itself counts an item whose answer is beyond its choices as answered wrong, whatever is said.

    Args:
        task: lm-eval's task object.
        doc: The row.
        fields: Those that must hold something.

    Raises:
        Exception: Whatever the task's own functions raise over such a row.
    """
    for field in fields:
        value = doc.get(field, 0)
        if value is None or (isinstance(value, str) and not value.strip()):
            return f"its {field} is empty"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None
    if task.OUTPUT_TYPE == "multiple_choice":
        return _choices_fault(task, doc)
    if not callable(task.config.process_results) and task.doc_to_target(doc) is None:
        return "it has no answer"
    return None


def _choices_fault(task: Any, doc: Mapping[str, Any]) -> str | None:
    choices = task.doc_to_choice(doc)
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        return "it has no choices"
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            return f"{choice!r} is no choice"
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if gold is None or gold == []:
        return "it has no answer"
    for one in gold if isinstance(gold, list) else [gold]:
        right = one in choices if isinstance(one, str) else isinstance(one, int) and 0 <= one < len(choices)
        if not right or isinstance(one, bool):
            return f"its answer is {one!r}, and it has {len(choices)} choices"
    return None


def encoded_pair(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a question and of one of its choices, as lm-eval takes them; BOS stands for an empty question."""
    if context:
        before, after = lm._encode_pair(context, continuation)
        return list(before), list(after)
    return [lm.prefix_token_id], list(lm.tok_encode(continuation, add_special_tokens=False))


def unfit(lm: Any, requests: Sequence[Any]) -> str | None:
    """Why lm-eval cannot take what is asked about an item; None where it can."""
    for request in requests:
        if request.request_type != "loglikelihood":
            continue
        context, continuation = encoded_pair(lm, *request.args)
        if not continuation:
            return f"{request.args[1]!r} has no tokens"
        if len(continuation) > lm.max_length:
            return f"a choice has {len(continuation)} tokens, and the model has room for {lm.max_length}"
        if not context:
            return "its question has no tokens"
    return None


def left_out_note(task: str, left_out: Mapping[str, str], n: int, what: str) -> str:
    """A sentence on items that are left out, the first of them by name.

    Args:
        task: The benchmark.
        left_out: By item why.
        n: Of how many.
        what: Of which kind, for example "cannot be asked or judged".
    """
    named = "; ".join(f"{item}: {why}" for item, why in list(left_out.items())[:LISTED])
    more = f"; and {len(left_out) - LISTED} more" if len(left_out) > LISTED else ""
    return f"{len(left_out)} of {n} items of {task} left out, which {what} ({named}{more})."
