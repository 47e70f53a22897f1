"""What a check is asked to measure: formats, granularities and treatments, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from melayer.errors import InputError, require_known
from melayer.numerics.grids import FORMATS, Format
from melayer.quantisation.calibration import GRANULARITIES, Granularity
from melayer.quantisation.treatments import MASKED, TREATMENTS, Treatment

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Choices:
    """The names that were given, once each and in their order."""

    formats: tuple[Format, ...]
    granularities: tuple[Granularity, ...]
    treatments: tuple[Treatment, ...]
    explicit: bool
    """Whether the treatments were named; if not, those that this model has nothing for are left out."""

    @classmethod
    def of(
        cls, formats: Sequence[str], granularities: Sequence[str], treatments: Sequence[str] | None = None
    ) -> Choices:
        """Checks the names.

        Args:
            formats: Of int8, fp8 and int4.
            granularities: Of per-tensor, per-token and per-channel.
            treatments: Of plain, baked, baked+mask and mask; None for all.

        Raises:
            InputError: There is none of a kind, or one is not among those that there are.
        """
        return cls(
            formats=_known("format", formats, FORMATS),
            granularities=_known("granularity", granularities, GRANULARITIES),
            treatments=_known("treatment", TREATMENTS if treatments is None else treatments, TREATMENTS),
            explicit=treatments is not None,
        )

    @property
    def masked(self) -> bool:
        """Whether a treatment has a mask."""
        return any(treatment in MASKED for treatment in self.treatments)

    @property
    def n_settings(self) -> int:
        """Their combinations."""
        return len(self.formats) * len(self.granularities) * len(self.treatments)


def _known(what: str, chosen: Sequence[str], names: tuple[Name, ...]) -> tuple[Name, ...]:
    if not chosen:
        raise InputError(f"There is no {what} to measure. Give some of {', '.join(names)}.")
    for name in chosen:
        require_known(name, names, f"There is no {what} {name!r}", expected="some of", suggest=True)
    return tuple(known for name in dict.fromkeys(chosen) for known in names if known == name)
