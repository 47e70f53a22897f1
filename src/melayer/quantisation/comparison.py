"""What each setting costs against the unquantised model, and what its treatment changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from melayer.numerics import paired
from melayer.numerics.paired import Difference
from melayer.quantisation.result import PerplexityScore, Setting
from melayer.quantisation.treatments import MASKED, WITHOUT_MASK


def compared(rows: Sequence[Setting], unquantised: PerplexityScore, n_predicted: int) -> Iterator[Setting]:
    """The settings with their differences, in their order.

    Args:
        rows: Each with its score.
        unquantised: The score without rounding.
        n_predicted: Tokens that each sequence predicts.
    """
    by_key = {(row.format, row.granularity, row.treatment): row for row in rows}
    for row in rows:
        plain = by_key.get((row.format, row.granularity, "plain"))
        unmasked = by_key.get((row.format, row.granularity, WITHOUT_MASK.get(row.treatment, "plain")))
        yield replace(
            row,
            cost=difference(unquantised, row.score, n_predicted),
            against_plain=difference(plain.score, row.score, n_predicted) if plain and plain != row else None,
            by_mask=difference(unmasked.score, row.score, n_predicted)
            if unmasked and row.treatment in MASKED
            else None,
        )


def difference(base: PerplexityScore, other: PerplexityScore, n_predicted: int) -> Difference | None:
    """The mean log-loss of `other` less that of `base`, with its interval by sequence; None where one is not finite."""
    pairs = [
        (b, o) for b, o in zip(base.by_sequence, other.by_sequence, strict=True) if b is not None and o is not None
    ]
    if len(pairs) < len(base.by_sequence):
        return None
    first, second = zip(*pairs, strict=True)
    return paired.difference(first, second, [n_predicted] * len(pairs))
