"""What a completion is worth to GRPO: whether its final answer is right, and whether it can be found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_MARK = "####"
_LINE = re.compile(r"^#### *\$?(-?[\d,]*\.?\d+)\$?\.?$")
_SECONDS = 5  # that one expression may take


def correctness(completions: Sequence[Any], gold: Sequence[str], **_: Any) -> list[float]:
    """1 for each completion whose final answer is the gold one, else 0.

    The final answer is what follows the last `####`; without one, the last `\\boxed{...}`; without that, what
    math-verify finds last in the text. Answers are compared as math, so that 1,000.0 is 1000 and 0.5 is 1/2.

    Args:
        completions: Texts, or lists of messages of which the last counts.
        gold: The right answers.
    """
    return [float(_is(final_answer(_text(given)), right)) for given, right in zip(completions, gold, strict=True)]


def answer_format(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for each completion with one `####`, in its last line, followed by a number and nothing else; else 0."""
    found = []
    for given in completions:
        text = _text(given).strip()
        last = text.splitlines()[-1].strip() if text else ""
        found.append(float(text.count(_MARK) == 1 and _LINE.match(last) is not None))
    return found


def final_answer(text: str) -> str:
    """The part of a completion that is its answer; empty where there is none."""
    if _MARK in text:
        rest = text.rpartition(_MARK)[2].strip()
        return rest.splitlines()[0].strip() if rest else ""
    at = text.rfind("\\boxed{")
    if at < 0:
        return text
    depth, start = 0, at + len("\\boxed")
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place].strip()
    return ""  # it was cut off


def is_gold(answer: str) -> bool:
    """Whether an answer can be compared with others at all."""
    return bool(answer.strip()) and bool(_parsed(answer))


def _is(answer: str, gold: str) -> bool:
    from math_verify import verify

    if not answer.strip():
        return False
    found = _parsed(answer)
    return bool(found) and bool(verify(_parsed(gold), found, timeout_seconds=_SECONDS))


def _parsed(text: str) -> list[Any]:
    """What math-verify reads; LaTeX from inside a box, or from a gold column, comes without its dollars."""
    from math_verify import parse

    if "\\" in text and "$" not in text and "\\boxed" not in text:
        found: list[Any] = parse(f"${text}$", parsing_timeout=_SECONDS)
        if found:
            return found
    return list(parse(text, parsing_timeout=_SECONDS))


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
