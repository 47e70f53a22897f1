"""The sink rate over the same blocks of models whose own ME layers may differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from melayer.measurements.sinks.result import SinksResult


def sink_rate_after(drawn: SinksResult, layer: int | None) -> float | None:
    """The share of (sequence, block, head) that are sinks, over the blocks after one.

    Args:
        drawn: What `sinks` found.
        layer: The block, also where the measured model's ME layer is another; None for all blocks.

    Returns:
        The share; None where none of these blocks has softmax attention.
    """
    by_layer = list(zip(drawn.rate_by_layer, drawn.alpha, strict=True))[0 if layer is None else layer + 1 :]
    # Blocks may have other numbers of heads.
    rates = [(rate, len(alpha)) for rate, alpha in by_layer if rate is not None and alpha is not None]
    n_heads = sum(heads for _, heads in rates)
    return sum(rate * heads for rate, heads in rates) / n_heads if n_heads else None
