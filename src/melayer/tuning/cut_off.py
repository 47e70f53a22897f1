"""Completions that ended because they were not allowed to be longer, which the rewards judge like all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KEY = "completions/clipped_ratio"
"""What TRL logs of each step: the share of its completions that no end-of-sequence token ends."""
CUT_SHARE = 0.05
"""From this share on it is said: what is cut off is rarely right, so that training learns to be short instead."""


def cut_off_notes(history: Sequence[Mapping[str, Any]], limit: int | None) -> Iterator[str]:
    """A sentence where many completions of training, or of validation, were cut off.

    Args:
        history: The lines of the log.
        limit: Tokens of a completion at most.
    """
    for key, of in ((KEY, "training"), (f"eval_{KEY}", "validation")):
        shares = [float(line[key]) for line in history if line.get(key) is not None]
        if shares and sum(shares) > CUT_SHARE * len(shares):
            yield (
                f"{sum(shares) / len(shares):.1%} of the completions of {of} were cut off at {limit} tokens, and their "
                "rewards are of what came before. Raise max_completion_length (--config)."
            )
