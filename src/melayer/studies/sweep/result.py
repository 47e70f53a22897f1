"""What `sweep` found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from melayer.measurements.locate.result import LocateResult
from melayer.model.provenance import ModelInfo
from melayer.numerics.intervals import FEW
from melayer.numerics.paired import Difference, difference
from melayer.presentation.numbers import change
from melayer.studies.sweep.settings import SweepSettings
from melayer.version import __version__

MILD = 1.05
"""A mask that raises the perplexity by no more than this factor is called mild."""


@dataclass(frozen=True)
class SweepPoint:
    """The figures of one mask, or of the plain model. None stands where there is nothing finite to measure."""

    selector: str | None
    """None for the plain model."""
    rate: float
    perplexity: float
    sink_rate: float
    """The share of (sequence, layer, head) in which key 0 is a sink."""
    sink_rate_after_me: float | None
    """Over the blocks after the plain model's ME layer, so that settings compare; None where there is none."""
    sink_rate_by_layer: tuple[float | None, ...]
    alpha: tuple[tuple[float | None, ...] | None, ...]
    """[layer][head] mean of the attention that key 0 draws; None for a layer without softmax attention."""
    cosine_next: tuple[float | None, ...]
    """[n_layers - 1] the massive token's state at each block's output against that at the next one's."""
    cosine_peak: tuple[float | None, ...]
    """[n_layers] the same against its state where the norm peaks."""
    cosine_rigid: float | None
    """Mean of `cosine_next` from the ME layer to the last block before the plain model erases the massive state."""
    rank_attn_in: float | None
    """Effective rank of what attention reads, mean over the blocks after the ME layer."""
    rank_attn_in_without: float | None
    """The same without the massive tokens."""
    rank_block_out: float | None
    """Effective rank of the residual stream, mean over the blocks after the ME layer."""
    rank_block_out_without: float | None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    """Ends of the 95 % interval of the perplexity, by sequence; None with a single one."""
    nll_by_sequence: tuple[float, ...] = field(default=(), repr=False)
    """The sum of the log-losses of each sequence's tokens, in nats."""

    @property
    def label(self) -> str:
        """What to call it."""
        return "plain" if self.selector is None else f"{self.selector} {self.rate:g}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepPoint:
        """The point that `asdict` and JSON made these values of."""
        rows = {key: tuple(values[key]) for key in ("sink_rate_by_layer", "cosine_next", "cosine_peak")}
        alpha = tuple(None if row is None else tuple(row) for row in values["alpha"])
        by_sequence = tuple(values["nll_by_sequence"])
        return cls(**{**values, **rows, "alpha": alpha, "nll_by_sequence": by_sequence})


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` found. Layers, heads and keys are 0-based."""

    model: ModelInfo
    settings: SweepSettings
    me_layer: int
    T: int
    epsilon: float
    n_sequences: int
    plain: SweepPoint
    masked: tuple[SweepPoint, ...]
    """By selector in the order asked for, then by rate."""
    notes: tuple[str, ...]
    located: LocateResult = field(compare=False, repr=False)
    """What `locate` found on the plain model, for a report; not part of `to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": self.settings,
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "T": self.T,
            "epsilon": self.epsilon,
            "n_sequences": self.n_sequences,
            "plain": asdict(self.plain),
            "masked": [asdict(point) for point in self.masked],
            "differences": [None if (by := self.difference(point)) is None else asdict(by) for point in self.masked],
            "notes": list(self.notes),
        }

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        """The plain model, then the masks."""
        return (self.plain, *self.masked)

    @property
    def mild(self) -> tuple[SweepPoint, ...]:
        """The masks that raise the perplexity by at most 5 %."""
        return tuple(point for point in self.masked if point.perplexity <= MILD * self.plain.perplexity)

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        plain = self.plain
        start = f"Without a mask the perplexity is {plain.perplexity:,.2f}"
        if plain.sink_rate_after_me is not None:
            start += f" and the sink rate after the ME layer (block {self.me_layer}) {plain.sink_rate_after_me:.1%}"
        if not self.masked:
            return f"{start}; no mask was measured."
        if not self.mild:
            best = min(self.masked, key=lambda point: point.perplexity)
            return (
                f"{start}; each of the {len(self.masked)} masks raises the perplexity by more than 5 %, {best.label} "
                f"least ({self.change_shown(best)})."
            )
        start += f"; {len(self.mild)} of {len(self.masked)} masks raise the perplexity by at most 5 %"
        rates = [(p.sink_rate_after_me, p) for p in self.mild if p.sink_rate_after_me is not None]
        if not rates:
            return f"{start}."
        rate, lowest = min(rates, key=lambda pair: pair[0])
        return (
            f"{start}, and of these {lowest.label} leaves the fewest sinks: {rate:.1%} at a perplexity of "
            f"{lowest.perplexity:,.2f} ({self.change_shown(lowest)})."
        )

    def change(self, point: SweepPoint) -> float:
        """The relative change of the perplexity against the plain model's."""
        return point.perplexity / self.plain.perplexity - 1

    def difference(self, point: SweepPoint) -> Difference | None:
        """What the mask adds to the log-loss of a token, in nats, with its interval by sequence.

        None where one of the two has no log-losses by sequence.
        """
        base, other = self.plain.nll_by_sequence, point.nll_by_sequence
        if not base or len(base) != len(other):
            return None
        return difference(base, other, [self.T - 1] * len(base))

    def change_interval(self, point: SweepPoint) -> tuple[float, float] | None:
        """Both ends of the interval of `change`."""
        by = self.difference(point)
        if by is None or by.low is None or by.high is None:
            return None
        return math.expm1(by.low), math.expm1(min(by.high, 700))

    def change_shown(self, point: SweepPoint) -> str:
        """The relative change of the perplexity for people, with its interval where there is one."""
        ends = self.change_interval(point)
        said = change(self.change(point))
        return said if ends is None else f"{said}, 95 % interval {change(ends[0])} to {change(ends[1])}"


def interval_notes(n_sequences: int) -> list[str]:
    """What the reader has to know of the intervals."""
    said = []
    if n_sequences == 1:
        said.append("One sequence gives no intervals: give more or longer texts, or a smaller T.")
    elif n_sequences < FEW:
        said.append(f"With {n_sequences} sequences the intervals of the perplexities are rough.")
    return said
