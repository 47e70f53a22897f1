"""What a run records of itself: all that its figures depend on, and that it is held to when it goes on."""

from __future__ import annotations

from typing import Any, TypedDict

from melayer.tuning.rows import Method


class DataSettings(TypedDict):
    """The rows."""

    source: str
    columns: dict[str, str]
    rows: int
    validation_rows: int
    left_out: dict[str, int]
    sha256: str
    chat: bool
    assistant_only: bool


class TuneSettings(TypedDict):
    """The whole run."""

    method: Method
    model: dict[str, Any]
    """The fields of `ModelInfo`."""
    mask: dict[str, Any] | None
    """The fields of `WeMask`."""
    reference: str | None
    lora: dict[str, Any] | None
    """The fields of `peft.LoraConfig`."""
    data: DataSettings
    config: dict[str, Any]
    """The trainer's options that do not depend on the place."""
    processes: int
    rewards: list[str] | None
    layers_counted_from: int
