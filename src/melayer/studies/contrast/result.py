"""What `measure` and `contrast` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from melayer.measurements.locate.result import LocateResult
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.sinks.result import SinksResult
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
        }


@dataclass(frozen=True)
class Figure:
    """One figure of both models."""

    name: str
    before: float | int | str | None
    after: float | int | str | None


@dataclass(frozen=True)
class ContrastResult:
    """Two models on the same texts. Layers are 0-based."""

    before: Measured
    after: Measured
    T: int
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "sentence": self.sentence,
            "T": self.T,
            "figures": [asdict(figure) for figure in self.figures],
            "notes": list(self.notes),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        first, second = self.before.located.me_layer, self.after.located.me_layer
        if first == second:
            where = "Neither model has an ME layer" if first is None else f"The ME layer is block {first} in both"
        else:
            where = f"The ME layer was {_block(first)} and is {_block(second)}"
        before, after = (side.sinks_after(first) for side in (self.before, self.after))
        if before is None or after is None:
            return f"{where}."
        over = "over all blocks" if first is None else f"after block {first}"
        same = "stayed at" if before == after else "went from"
        rates = f"{before:.1%}" if before == after else f"{before:.1%} to {after:.1%}"
        return f"{where}; the sink rate {over} {same} {rates}."


def _block(layer: int | None) -> str:
    return "nowhere" if layer is None else f"block {layer}"
