"""What `measure` and `contrast` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from melayer.measurements.locate.result import LocateResult
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.sinks.result import SinksResult
from melayer.presentation.numbers import share, unsigned_zero
from melayer.studies.sink_rate import sink_rate_after
from melayer.version import __version__

if TYPE_CHECKING:
    from melayer.interventions.mask import WeMask


@dataclass(frozen=True)
class Measured:
    """One model's ME layer, rigidity and sinks."""

    located: LocateResult
    rigidity: RigidityResult
    sinks: SinksResult
    asked: Mapping[str, Any]
    """What the figures depend on beside the model: two models are compared under the same."""
    mask: WeMask | None
    """The mask that was applied while it was measured."""
    notes: tuple[str, ...] = ()
    """What was warned of meanwhile."""

    @property
    def largest(self) -> tuple[float | None, int | None, int | None]:
        """The largest finite |h| at a block's output, with its block and dimension."""
        rows = [(row.max_abs, row.layer, row.dim) for row in self.located.blocks if row.max_abs is not None]
        return max(rows, key=lambda row: row[0]) if rows else (None, None, None)

    def sinks_after(self, layer: int | None) -> float | None:
        """The sink rate over the blocks after one, whichever the model's own ME layer is."""
        return sink_rate_after(self.sinks, layer)

    @property
    def rigid(self) -> float | None:
        """The lowest cosine between neighbouring blocks from the ME layer until the state is erased."""
        at, until = self.rigidity.me_layer, self.rigidity.rigid_until
        if at is None or until is None:
            return None
        return min((value for value in self.rigidity.cosine_next[at:until] if value is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The three results as plain values."""
        return {
            "locate": self.located.to_dict(),
            "rigidity": self.rigidity.to_dict(),
            "sinks": self.sinks.to_dict(),
            "mask": None if self.mask is None else asdict(self.mask),
            "notes": list(self.notes),
        }


Value = float | int | str | None


@dataclass(frozen=True)
class Figure:
    """One figure of both models, each without and with the mask."""

    name: str
    before: Value
    after: Value
    before_masked: Value = None
    after_masked: Value = None

    @property
    def training(self) -> float | None:
        """What training changes without the mask; None where a difference means nothing, as of two blocks."""
        return _difference(self.after, self.before)

    @property
    def masking(self) -> float | None:
        """What the mask changes in the first model."""
        return _difference(self.before_masked, self.before)

    @property
    def interaction(self) -> float | None:
        """What the mask changes in the second model beyond that: with the other two, the whole change."""
        with_training, alone = _difference(self.after_masked, self.after), self.masking
        return None if with_training is None or alone is None else with_training - alone

    def to_dict(self) -> dict[str, Any]:
        """The figure and its split as plain values."""
        split = {"training": self.training, "mask": self.masking, "interaction": self.interaction}
        return {**asdict(self), **split}


def _difference(value: Value, other: Value) -> float | None:
    # A block or a dimension is a number, but the difference of two of them is not a change of anything.
    return value - other if isinstance(value, float) and isinstance(other, float) else None


@dataclass(frozen=True)
class ContrastResult:
    """Two models on the same texts. Layers are 0-based.

    Where the second one carries a mask, there are four of them: each without it and with it, so that what the mask
    does at work is not taken for what training has changed.
    """

    before: Measured
    after: Measured
    T: int
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    before_masked: Measured | None = None
    """The first model under the second one's mask; None where there is none, or it does not fit."""
    after_masked: Measured | None = None
    """The second model under its mask; None where it has none."""

    @property
    def columns(self) -> dict[str, Measured]:
        """What was measured, by the name of its column, in order."""
        sides = {
            "before": self.before,
            "before, masked": self.before_masked,
            "after": self.after,
            "after, masked": self.after_masked,
        }
        return {name: side for name, side in sides.items() if side is not None}

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        masked = {"before_masked": self.before_masked, "after_masked": self.after_masked}
        return {
            "melayer_version": __version__,
            "sentence": self.sentence,
            "T": self.T,
            "figures": [figure.to_dict() for figure in self.figures],
            "notes": list(self.notes),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            **{name: None if side is None else side.to_dict() for name, side in masked.items()},
        }

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        first, second = self.before.located.me_layer, self.after.located.me_layer
        if first == second:
            where = "Neither model has an ME layer" if first is None else f"The ME layer is block {first} in both"
        else:
            where = f"The ME layer was {_block(first)} and is {_block(second)}"
        over = "over all blocks" if first is None else f"after block {first}"
        rates = Figure("sink rate", *(side.sinks_after(first) for side in (self.before, self.after)))
        if rates.before is None or rates.after is None:
            return f"{where}."
        said = f"{where}{self._unfair}; the sink rate {over} {_went(rates.before, rates.after)}"
        if self.after_masked is None:
            return f"{said}."
        return f"{said} without the mask{self._masked(rates, first)}."

    @property
    def _unfair(self) -> str:
        """Where the two were measured under masks that the caller had applied, that the change is the mask's too."""
        masks = {side.mask for side in (self.before, self.after)}
        if len(masks) == 1:
            return ""
        return " (measured under different masks, so that changes are the masks' as well as training's)"

    def _masked(self, rates: Figure, at: int | None) -> str:
        """What the mask does beside training, as the end of the sentence."""
        assert self.after_masked is not None
        before = None if self.before_masked is None else self.before_masked.sinks_after(at)
        whole = Figure(rates.name, rates.before, rates.after, before, self.after_masked.sinks_after(at))
        if whole.after_masked is None:
            return ""
        if whole.training is None or whole.masking is None or whole.interaction is None:
            return f", and is {share(whole.after_masked)} with it at work"  # type: ignore[arg-type]
        total = whole.training + whole.masking + whole.interaction
        return (
            f". With it at work it ends at {share(whole.after_masked)}: of the change of {points(total)} points "  # type: ignore[arg-type]
            f"{points(whole.training)} are training's, {points(whole.masking)} what the mask does to the first model, "
            f"and {points(whole.interaction)} what it does beyond that to the second"
        )


def _went(before: Value, after: Value) -> str:
    first, second = share(before), share(after)  # type: ignore[arg-type]
    return f"stayed at {first}" if before == after else f"went from {first} to {second}"


def _block(layer: int | None) -> str:
    return "nowhere" if layer is None else f"block {layer}"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return unsigned_zero(f"{100 * value:+.1f}")
