"""Intervals of paired differences whose coverage was computed or simulated before they were chosen.

`tools/interval_coverage.py` holds the protocol and prints the coverage; `docs/statistics.md` keeps what it printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

LEVEL = 0.95
"""Of confidence."""
FEW = 20
"""Of fewer items `ratio_interval` can cover less than 92 % where their changes are skewed or their sizes differ."""


def paired_share_interval(
    wins: npt.ArrayLike, losses: npt.ArrayLike, n: int, *, level: float = LEVEL
) -> tuple[Values, Values]:
    """The score interval of a difference of two shares of the same items (Tango 1998, Stat. Med. 17, 891-908).

    It holds the differences d that the score test does not reject: (wins - losses - n d)^2 <= z^2 n v(d), where the
    variance v(d) = 2 q + d (1 - d) is taken *at* d, and q, the share of items lost, is the likeliest one there. That
    is why items that do not differ do not make it empty: of none among n it is 0 +- z^2 / (n + z^2).

    Args:
        wins: [...] items that are right under the second variant only.
        losses: [...] items that are right under the first variant only.
        n: Items, at least 1.
        level: Of confidence.

    Returns:
        Both ends, each [...], between -1 and 1.

    Example:
        >>> low, high = paired_share_interval(2, 6, 64)
        >>> round(float(low), 3), round(float(high), 3)
        (-0.165, 0.029)
    """
    from scipy.optimize import elementwise
    from scipy.stats import norm

    won, lost = np.broadcast_arrays(np.asarray(wins, dtype=np.float64), np.asarray(losses, dtype=np.float64))
    z = float(norm.ppf((1 + level) / 2))

    def excess(d: Values, won: Values, lost: Values, side: float) -> Values:
        """Falls with d, from above 0 to below it; 0 where the score is at `side` * z. Bounded, also where v is 0."""
        linear, constant = (2 * n - won + lost) * d - won - lost, -lost * d * (1 - d)
        q = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
        score = won - lost - n * d
        length = np.hypot(score, z * np.sqrt(np.maximum(n * (2 * q + d * (1 - d)), 0)))
        share: Values = np.divide(score, length, out=np.zeros_like(score), where=length > 0)
        return share - side * math.sqrt(0.5)

    found, ones = (won - lost) / n, np.ones_like(won)
    low = elementwise.find_root(excess, (-ones, found), args=(won, lost, 1.0)).x
    high = elementwise.find_root(excess, (found, ones), args=(won, lost, -1.0)).x
    # Where all items are lost, or won, the end is the difference itself, which is no root.
    return np.where(lost == n, -1.0, low), np.where(won == n, 1.0, high)


def ratio_interval(
    values: npt.ArrayLike, sizes: npt.ArrayLike, *, added: Sequence[float] = (), level: float = LEVEL
) -> tuple[float, float] | None:
    """An interval of sum(values) / sum(sizes) over items that are drawn independently, by Student's t.

    The variance is that of the ratio's linear part (Cochran 1977, section 2.11): the spread of values - ratio * sizes.
    Items of which nearly all have the same value say little about that spread. Where values are bounded, `added`
    items keep the interval from being far too narrow, as Agresti & Coull (1998) and Bonett & Price (2012) do it.

    Args:
        values: [n] of each item.
        sizes: [n] of each item, above 0.
        added: Values of further items of the mean size, which count for the interval alone.
        level: Of confidence.

    Returns:
        Both ends; None where there is one item, or no spread to measure.

    Example:
        >>> low, high = ratio_interval([0.1, 0.3, 0.2, 0.4], [1, 1, 1, 1])
        >>> round(low, 3), round(high, 3)
        (0.045, 0.455)
    """
    from scipy.stats import t

    size = np.asarray(sizes, dtype=np.float64)
    value = np.concatenate([np.asarray(values, dtype=np.float64), added])
    size = np.concatenate([size, np.full(len(added), size.mean())])
    n = len(value)
    if n < 2:
        return None
    ratio = value.sum() / size.sum()
    residual = value - ratio * size
    if np.abs(residual).max() <= 1e-12 * np.abs(value).max():  # rounding alone
        return None
    error = np.sqrt((residual**2).sum() * n / (n - 1)) / size.sum()
    reach = float(t.ppf((1 + level) / 2, n - 1) * error)
    return float(ratio - reach), float(ratio + reach)
