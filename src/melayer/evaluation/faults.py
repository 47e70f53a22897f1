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
    """Why lm-eval cannot take what is asked about an item; None where it can.

    The tokens of a choice are counted where its text leaves a doubt: a long prompt takes a while.
    """
    for request in requests:
        if request.request_type != "loglikelihood":
            continue
        context, choice = request.args
        if choice.strip() and len(choice.encode()) < lm.max_length and (not context or context.strip()):
            continue
        before, after = encoded_pair(lm, context, choice)
        if not after:
            return f"{choice!r} has no tokens"
        if len(after) > lm.max_length:
            return f"a choice has {len(after)} tokens, and the model has room for {lm.max_length}"
        if not before:
            return "its question has no tokens"
    return None


def lost(lm: Any, requests: Sequence[Any]) -> int:
    """Tokens at the beginning of an item's prompt that lm-eval leaves out for want of room."""
    kind = requests[0].request_type
    if kind == "generate_until":
        room = int(lm.max_length) - int(requests[0].args[1]["max_gen_toks"])
        return max(0, len(lm.tok_encode(requests[0].args[0])) - room)
    if kind != "loglikelihood":
        return 0  # a long text is scored in several windows, all of it
    longest = max(requests, key=lambda request: sum(map(len, request.args)))
    if sum(len(text.encode()) for text in longest.args) < lm.max_length:  # a token has at least one byte
        return 0
    return max(0, sum(map(len, encoded_pair(lm, *longest.args))) - int(lm.max_length) - 1)


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
