"""Paired comparison: the same items answered by two variants, and what can be concluded from that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from melayer.errors import InputError
from melayer.numerics.intervals import LEVEL, Values, paired_share_interval, ratio_interval

RESAMPLES = 10_000
"""Of the permutation test."""


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
    low: float | None
    high: float | None
    """Of right and wrong: the score interval (Tango 1998). Of other values: Student's t by item, for shares of an
    item's parts with one item added that is won and one that is lost. None where there is no spread to measure."""
    level: float
    wins: int
    """Items on which the other variant is better."""
    losses: int
    ties: int
    p: float
    """Two-sided. Of right and wrong: mid-p McNemar test (Fagerland, Lydersen & Laake 2013), whose conclusions are those
    of the interval but for a few tables. Of other values: sign-flip permutation test by item."""
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
        start = f"wins {self.wins}, losses {self.losses}, ties {self.ties}: "
        if not self.higher_is_better:
            start = f"(less is better) {start}"
        if self.low is None or self.high is None:
            if self.wins == self.losses == 0:
                return f"{start}no item differs."
            return f"{start}{self.n} item{'' if self.n == 1 else 's'} of the same change give no interval."
        sign = scale if self.higher_is_better else -scale
        low, high = sorted((sign * self.low, sign * self.high))
        digits = _digits(high - low)
        low, high, gain = (round(value, digits) + 0.0 for value in (low, high, sign * self.difference))  # no -0.0
        interval = f"{self.level:.0%} interval {low:.{digits}f} to {high:.{digits}f}"
        if self.shown:
            return f"{start}a {'gain' if gain > 0 else 'loss'} of {abs(gain):.{digits}f} {unit}, {interval}."
        ruled_out = []
        if high >= 0:
            ruled_out.append(f"a gain of more than {high:.{digits}f} {unit}")
        if low <= 0:
            ruled_out.append(f"a loss of more than {-low + 0.0:.{digits}f} {unit}")
        none = "no item differs" if self.wins == self.losses == 0 else "no difference shown"
        return (
            f"{start}{none} ({gain:+.{digits}f} {unit}, {interval}, p {self.adjusted:.2g}{self._at_odds}); the data "
            f"rule out {' and '.join(ruled_out)}."
        )

    @property
    def _at_odds(self) -> str:
        """Why the interval leaves out 0 and the p-value does not call it a difference, or the other way round."""
        if self._leaves_out_0 and self.p < 1 - self.level:
            return " corrected for the number of comparisons, which the interval is not"
        if self._leaves_out_0:
            return " by a test that asks for more than the interval"
        if self.adjusted < 1 - self.level:
            return ", but the interval holds 0"
        return ""

    @property
    def _leaves_out_0(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def shown(self) -> bool:
        """Whether the data show a difference: by the (adjusted) test, and by an interval that leaves out 0."""
        return self.adjusted < 1 - self.level and self._leaves_out_0


@dataclass(frozen=True)
class Difference:
    """Of two mean log-losses of the same tokens, in nats a token; more is worse."""

    value: float
    low: float | None
    """Ends of the interval by sequence (`intervals.ratio_interval`); None with a single sequence, or no spread."""
    high: float | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


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
        resamples: Of the permutation test.
        seed: Of its draw.
        higher_is_better: Which direction counts as a win.

    Raises:
        InputError: There are no items, the lengths differ, or a value is not finite.

    Example:
        >>> compare([1, 0, 0, 1], [1, 1, 1, 1]).wins
        2
    """
    if not (len(base) == len(other) == (len(base) if sizes is None else len(sizes))) or not len(base):
        raise InputError(f"{len(base)} items were given for one variant and {len(other)} for the other.")
    first, second = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    size = np.ones_like(first) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if not all(bool(np.isfinite(values).all()) for values in (first, second, size)):
        raise InputError("A value is not finite, so that no mean can be had. Leave that item out of both variants.")
    change = second - first
    rises, falls = int((change > 0).sum()), int((change < 0).sum())
    wins, losses = (rises, falls) if higher_is_better else (falls, rises)
    ends: tuple[float | None, float | None]
    if bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all() and (size == 1).all()):
        low, high = paired_share_interval(rises, falls, len(first), level=level)
        test, p, ends = "mid-p McNemar", _mid_p(rises, falls), (float(low), float(high))
    else:
        test, p = "sign-flip permutation", _flipped(change, resamples, np.random.default_rng([seed, 1]))
        ends = _of_parts(first, second, size, level)
    return Comparison(
        n=len(first),
        base=float(first.sum() / size.sum()),
        other=float(second.sum() / size.sum()),
        difference=float(change.sum() / size.sum()),
        low=ends[0],
        high=ends[1],
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


def difference(base: Sequence[float], other: Sequence[float], sizes: Sequence[float]) -> Difference:
    """The difference `other - base` of a ratio of sums over the same sequences, with its interval by sequence.

    Args:
        base: Each sequence's sum over its tokens under the first variant.
        other: The same sequences under the other variant, in the same order.
        sizes: Each sequence's number of tokens.

    Example:
        >>> difference([1.0, 2.0], [2.0, 3.5], [1, 1]).value
        1.25
    """
    size = np.asarray(sizes, dtype=np.float64)
    change = np.asarray(other, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    low, high = ratio_interval(change, size) or (None, None)
    return Difference(float(change.sum() / size.sum()), low, high)


_AT_ONCE = 2_000_000
"""Random numbers held at a time."""


def _of_parts(first: Values, second: Values, size: Values, level: float) -> tuple[float | None, float | None]:
    """Both ends of the interval where an item is more than right or wrong."""
    change = second - first
    if not all(bool(((value >= 0) & (value <= size)).all()) for value in (first, second)):
        return ratio_interval(change, size, level=level) or (None, None)
    # Shares: an item that does not differ may still have done so. One more is won and one is lost, each by as much
    # as any that differs, or whole.
    most = float(np.abs(change).max()) or float(size.mean())
    low, high = ratio_interval(change, size, added=(most, -most), level=level) or (-1.0, 1.0)
    return max(low, -1.0), min(high, 1.0)


def _mid_p(rises: int, falls: int) -> float:
    """McNemar's test of the items that differ, with half the weight on what was found."""
    from scipy.stats import binom

    n, fewer = rises + falls, min(rises, falls)
    if not n:
        return 1.0
    found = float(binom.pmf(fewer, n, 0.5))
    return 1 - found / 2 if rises == falls else float(2 * binom.cdf(fewer, n, 0.5)) - found


def _digits(width: float) -> int:
    """Decimals that show an interval of this width to two digits, at least one."""
    return max(1, 1 - math.floor(math.log10(width))) if width > 0 else 1


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
