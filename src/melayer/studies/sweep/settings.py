"""What a sweep's result says about how it came to be."""

from __future__ import annotations

from typing import Any, TypedDict


class BosChoice(TypedDict):
    """Whether sequences begin with the begin-of-sequence token."""

    asked: bool | None
    """None leaves it to the tokenizer."""
    sequences_with_bos: int


class SharedSettings(TypedDict):
    """What all masks of a sweep share."""

    strength: float
    layers: list[int] | None
    """The masked blocks; None for all with softmax attention after the ME layer."""
    seed: int
    criterion: dict[str, Any]
    texts: str
    texts_sha256: str
    bos: BosChoice
    layers_counted_from: int


class SweepSettings(SharedSettings):
    """Of `SweepResult.settings`."""

    rates: list[float]
    selectors: list[str]
