"""What a sweep's result says about how it came to be."""

from __future__ import annotations

from melayer.measurements.settings import CriterionSettings, LayerSettings, WindowSettings


class SharedSettings(WindowSettings, LayerSettings):
    """What all masks of a sweep share."""

    strength: float
    layers: list[int] | None
    """The masked blocks; None for all with softmax attention after the ME layer."""
    seed: int
    criterion: CriterionSettings
    texts_sha256: str


class SweepSettings(SharedSettings):
    """Of `SweepResult.settings`."""

    rates: list[float]
    selectors: list[str]
