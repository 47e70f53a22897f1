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
    """The comparisons with p-values adjusted for having made all of them (Holm 1979).

    Raises:
        InputError: statsmodels is not installed, which the extra `eval` brings.
    """
    if not comparisons:
        return []
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise InputError(
            "Correcting for several comparisons needs statsmodels, which is not installed. Get it with: "
            "pip install 'melayer[eval]'"
        ) from error
    _, adjusted, _, _ = multipletests([comparison.p for comparison in comparisons], method="holm")
    return [replace(one, p_holm=float(p)) for one, p in zip(comparisons, adjusted, strict=True)]


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
    """Both ends of the percentile interval of sum(change) / sum(size), resampled by item."""
    from scipy.stats import bootstrap

    if len(change) == 1:  # scipy refuses it: drawn again it is always itself
        only = float(change[0] / size[0])
        return only, only
    found = bootstrap(
        (change, size),
        lambda change, size, axis: change.sum(axis=axis) / size.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(change),
        method="percentile",
        rng=random,
    )
    # Not its own interval, whose last digits depend on scipy's version.
    low, high = np.quantile(found.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _flipped(change: Values, resamples: int, random: np.random.Generator) -> float:
    """How often random signs make a sum at least as large; the data's own count as one draw (Phipson & Smyth 2010).

    Not `scipy.stats.permutation_test`: it makes its signs by sorting random numbers, and is exact for few items, so
    that the figures of older versions could not be had again.
    """
    from scipy.stats import monte_carlo_test

    change = change[change != 0]
    if not len(change):
        return 1.0
    share = change / np.abs(change).sum()
    found = monte_carlo_test(
        np.ones(len(change)),
        lambda size: random.integers(2, size=size) * 2 - 1,
        # Sums of the same values in another order differ by rounding, which is not a difference.
        lambda signs, axis: np.abs(signs @ share).round(12),
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(change),
        alternative="greater",
    )
    return float(found.pvalue)


def _batch(change: Values) -> int:
    """Resamples drawn at a time."""
    return max(1, _AT_ONCE // len(change))
