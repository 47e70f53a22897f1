"""The options of `tune`, beside what every measurement takes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from melayer.cli.masks import MaskRequest
from melayer.cli.options import BLOCKS, POSITIONS, SELECTOR, STRENGTH, Options
from melayer.cli.parsing import blocks_of
from melayer.errors import InputError

_ROWS, _MASK, _TRAINING = "Rows", "Mask", "Training"


@dataclass(frozen=True)
class RowOptions:
    """What to train on."""

    columns: Annotated[
        str | None,
        typer.Option(help="Which column is which, e.g. prompt=question,response=answer.", rich_help_panel=_ROWS),
    ] = None
    validation: Annotated[
        str | None, typer.Option(help="A share of the rows, e.g. 0.05, or a file.", rich_help_panel=_ROWS)
    ] = None
    rows: Annotated[int | None, typer.Option(min=1, help="Take only the first rows.", rich_help_panel=_ROWS)] = None
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Chat template; default: where there is one.", rich_help_panel=_ROWS),
    ] = None
    system: Annotated[str | None, typer.Option(help="A system prompt.", rich_help_panel=_ROWS)] = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `sft`, `dpo` and `grpo`."""
        columns = {}
        for item in filter(None, (self.columns or "").split(",")):
            role, equals, column = item.strip().partition("=")
            if not (role and equals and column):
                raise InputError(f"--columns {item!r} was given; expected e.g. prompt=question,response=answer.")
            columns[role] = column
        validation: str | float | None = self.validation
        if validation is not None:
            with contextlib.suppress(ValueError):  # a file
                validation = float(validation)
        return {
            "columns": columns or None,
            "validation": validation,
            "limit": self.rows,
            "chat": self.chat,
            "system": self.system,
        }


@dataclass(frozen=True)
class MaskOptions:
    """What is masked while it trains."""

    mask_rate: Annotated[
        float | None,
        typer.Option(help="The share of the dimensions to mask; default: no mask.", rich_help_panel=_MASK),
    ] = None
    strength: Annotated[float, typer.Option(help=STRENGTH, rich_help_panel=_MASK)] = 1.0
    selector: Annotated[str, typer.Option(help=SELECTOR, rich_help_panel=_MASK)] = "weight"
    layers: Annotated[str | None, typer.Option(help=BLOCKS, rich_help_panel=_MASK)] = None
    positions: Annotated[str, typer.Option(help=POSITIONS, rich_help_panel=_MASK)] = "first"

    def request(self, seed: int) -> MaskRequest:
        """The mask, with the seed of everything random."""
        blocks = blocks_of("--layers", self.layers)
        return MaskRequest(self.mask_rate, self.selector, self.strength, seed, self.positions, blocks)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train."""

    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps; default: the trainer's epochs.", rich_help_panel=_TRAINING),
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Default: the trainer's.", rich_help_panel=_TRAINING)] = (
        None
    )
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at once on each device.", rich_help_panel=_TRAINING)
    ] = None
    lora: Annotated[
        bool, typer.Option("--lora", help="Train an adapter, not all weights.", rich_help_panel=_TRAINING)
    ] = False
    lora_rank: Annotated[int, typer.Option(min=1, help="Of the adapter.", rich_help_panel=_TRAINING)] = 16
    lora_alpha: Annotated[int, typer.Option(min=1, help="Its scale is alpha / rank.", rich_help_panel=_TRAINING)] = 32
    lora_targets: Annotated[str, typer.Option(help="Modules, e.g. q_proj,v_proj.", rich_help_panel=_TRAINING)] = (
        "all-linear"
    )
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with any option of TRL's SFTConfig, DPOConfig or GRPOConfig.", rich_help_panel=_TRAINING
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.", rich_help_panel=_TRAINING)] = 0
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.", rich_help_panel=_TRAINING)
    ] = False

    def adapter(self) -> bool | dict[str, Any]:
        """The argument `lora`."""
        if not self.lora:
            return False
        targets: str | list[str] = self.lora_targets
        if targets != "all-linear":
            targets = [name.strip() for name in self.lora_targets.split(",") if name.strip()]
        return {"r": self.lora_rank, "lora_alpha": self.lora_alpha, "target_modules": targets}

    def overrides(self) -> dict[str, Any]:
        """What the command line says of the trainer's options, over what the file says."""
        said = {
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
        }
        return {key: value for key, value in said.items() if value is not None}


@dataclass(frozen=True)
class TuneOptions(Options):
    """What `tune` takes beside what every measurement takes."""

    rows: RowOptions = field(default_factory=RowOptions)
    masking: MaskOptions = field(default_factory=MaskOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
