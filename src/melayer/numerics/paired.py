"""Paired comparison: the same items answered by two variants, and what can be concluded from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from melayer.errors import InputError

Values = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Share:
    """A share of items with its Wilson interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """The difference of a score between two variants, over the items that both answered.

    A score is the sum of the items' values over the sum of their sizes: of accuracy each size is 1, of IFEval's
    instructions it is their number in the prompt, of log-likelihood the number of words or bytes.
    """

    n: int
    """Items."""
    base: float
    other: float
    difference: float
    """`other - base`."""
    low: float
    high: float
    """Paired bootstrap interval of the difference (percentile, resampled by item)."""
    level: float
    wins: int
    """Items on which the other variant is better."""
    losses: int
    ties: int
    p: float
    """Two-sided. Of right and wrong: exact McNemar test. Of other values: sign-flip permutation test by item."""
    test: str
    p_holm: float | None = None
    """Adjusted (Holm 1979) for all comparisons made together; None where it stands alone."""
    higher_is_better: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @property
    def adjusted(self) -> float:
        """The p-value to judge by."""
        return self.p if self.p_holm is None else self.p_holm

    def sentence(self, *, unit: str = "points", scale: float = 100.0) -> str:
        """What can be concluded, computed from the figures.

        Args:
            unit: What differences are counted in.
            scale: How many of them make 1.
        """
        sign = 1 if self.higher_is_better else -1
        low, high = sorted((sign * scale * self.low, sign * scale * self.high))
        gain = sign * scale * self.difference
        low, high, gain = (round(value, 1) + 0.0 for value in (low, high, gain))  # no -0.0
        interval = f"{self.level:.0%} interval {low:.1f} to {high:.1f}"
        start = f"wins {self.wins}, losses {self.losses}, ties {self.ties}: "
        if not self.higher_is_better:
            start = f"(less is better) {start}"
        if self.wins == self.losses == 0:
            return f"{start}no item differs."
        size = f"{abs(gain):.1f} {unit}"
        if self.shown and gain > 0:
            return f"{start}a gain of {size}, {interval}."
        if self.shown:
            return f"{start}a loss of {size}, {interval}."
        ruled_out = []
        if high >= 0:
            ruled_out.append(f"a gain of more than {high:.1f} {unit}")
        if low <= 0:
            ruled_out.append(f"a loss of more than {-low + 0.0:.1f} {unit}")
        return (
            f"{start}no difference shown ({gain:+.1f} {unit}, {interval}, p {self.adjusted:.2g}); the data rule out "
            f"{' and '.join(ruled_out)}."
        )

    @property
    def shown(self) -> bool:
        """Whether the data show a difference: by the (adjusted) test, and by an interval that leaves out 0."""
        return self.adjusted < 1 - self.level and (self.low > 0 or self.high < 0)


def wilson(right: int, n: int, *, level: float = LEVEL) -> Share:
    """The share of right answers with its Wilson score interval.

    Args:
        right: How many were right.
        n: Of how many, at least 1.
        level: Of confidence.

    Example:
        >>> share = wilson(8, 10)
        >>> round(share.low, 3), round(share.high, 3)
        (0.49, 0.943)
    """
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(level, method="wilson")
    return Share(right / n, float(interval.low), float(interval.high), n)


def compare(
    base: Sequence[float],
    other: Sequence[float],
    sizes: Sequence[float] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    higher_is_better: bool = True,
) -> Comparison:
    """The difference between two variants on the same items.

    Args:
        base: Each item's value under the first variant: 1 or 0, or a sum over the item's parts.
        other: The same items under the other variant, in the same order.
        sizes: Each item's number of parts, the same under both; by default 1.
        level: Of confidence.
        resamples: Of the bootstrap, and of the permutation test.
        seed: Of both draws.
        higher_is_better: Which direction counts as a win.

    Raises:
        InputError: There are no items, or the lengths differ.

    Example:
        >>> compare([1, 0, 0, 1], [1, 1, 1, 1]).wins
        2
    """
    from scipy.stats import binomtest

    if not (len(base) == len(other) == (len(base) if sizes is None else len(sizes))) or not len(base):
        raise InputError(f"{len(base)} items were given for one variant and {len(other)} for the other.")
    first, second = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    size = np.ones_like(first) if sizes is None else np.asarray(sizes, dtype=np.float64)
    change = second - first
    rises, falls = int((change > 0).sum()), int((change < 0).sum())
    wins, losses = (rises, falls) if higher_is_better else (falls, rises)
    # One stream for each purpose, so that one may change without the other.
    draws, flips = (np.random.default_rng([seed, purpose]) for purpose in range(2))
    low, high = _bootstrap(change, size, level, resamples, draws)
    if bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all() and (size == 1).all()):
        test = "exact McNemar"
        p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    else:
        test = "sign-flip permutation"
        p = _flipped(change, resamples, flips)
    return Comparison(
        n=len(first),
        base=float(first.sum() / size.sum()),
        other=float(second.sum() / size.sum()),
        difference=float(change.sum() / size.sum()),
        low=low,
        high=high,
        level=level,
        wins=wins,
        losses=losses,
        ties=len(first) - wins - losses,
        p=p,
        test=test,
        higher_is_better=higher_is_better,
    )


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values adjusted for having made all of them (Holm 1979)."""
    order = sorted(range(len(comparisons)), key=lambda place: comparisons[place].p)
    adjusted, reached = [0.0] * len(comparisons), 0.0
    for rank, place in enumerate(order):
        # Never below that of a smaller p-value.
        reached = max(reached, min(1.0, comparisons[place].p * (len(comparisons) - rank)))
        adjusted[place] = reached
    return [replace(comparison, p_holm=p) for comparison, p in zip(comparisons, adjusted, strict=True)]


def interval(
    base: Sequence[float],
    other: Sequence[float],
    sizes: Sequence[float],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The difference `other - base` of a score and both ends of its paired bootstrap interval, as in `compare`.

    Args:
        base: Each item's sum over its parts under the first variant.
        other: The same items under the other variant, in the same order.
        sizes: Each item's number of parts.
        level: Of confidence.
        resamples: Of the bootstrap.
        seed: Of its draw.

    Example:
        >>> interval([1.0, 2.0], [2.0, 3.0], [1, 1])
        (1.0, 1.0, 1.0)
    """
    size = np.asarray(sizes, dtype=np.float64)
    change = np.asarray(other, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    low, high = _bootstrap(change, size, level, resamples, np.random.default_rng([seed, 0]))
    return float(change.sum() / size.sum()), low, high


_AT_ONCE = 2_000_000
"""Random numbers held at a time."""


def _bootstrap(
    change: Values, size: Values, level: float, resamples: int, random: np.random.Generator
) -> tuple[float, float]:
    found: list[Values] = []
    step = max(1, _AT_ONCE // len(change))
    for start in range(0, resamples, step):
        chosen = random.integers(len(change), size=(min(step, resamples - start), len(change)))
        found.append(change[chosen].sum(axis=1) / size[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _flipped(change: Values, resamples: int, random: np.random.Generator) -> float:
    """How often random signs make a sum at least as large; the data's own count as one draw (Phipson & Smyth 2010)."""
    change = change[change != 0]
    if not len(change):
        return 1.0
    # Sums of the same values in another order differ by rounding, which is not a difference.
    seen = abs(float(change.sum())) * (1 - 1e-9)
    larger, step = 0, max(1, _AT_ONCE // len(change))
    for start in range(0, resamples, step):
        signs = random.integers(2, size=(min(step, resamples - start), len(change))) * 2 - 1
        larger += int((np.abs(signs @ change) >= seen).sum())
    return (larger + 1) / (resamples + 1)
