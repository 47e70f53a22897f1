"""What a check's result says about how it came to be."""

from __future__ import annotations

from typing import Any, TypedDict

from melayer.measurements.settings import CriterionSettings, LayerSettings, Origin
from melayer.numerics.grids import Format
from melayer.quantisation.calibration import Granularity
from melayer.quantisation.treatments import Treatment


class PrefixChoice(TypedDict):
    """How the prefix came to be."""

    asked: bool | None
    """Whether the begin-of-sequence token was asked for; None leaves it to the tokenizer."""
    is_prefix: bool
    """Whether that token is the prefix."""


class QuantCheckSettings(LayerSettings):
    """Of `QuantCheckResult.settings`."""

    formats: list[Format]
    granularities: list[Granularity]
    treatments: list[Treatment]
    texts: Origin
    calibration: str
    mask: dict[str, Any] | None
    """The fields of the mask; None where no treatment has one."""
    bos: PrefixChoice
    criterion: CriterionSettings
    massive_above: float
    """What a token's largest |h| at the ME layer's output exceeds if it is massive; 0 without an ME layer."""
    level: float
    """Of the intervals."""
    left_unquantised: str
