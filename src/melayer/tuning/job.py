"""What a run is asked for: by which method, on which terms, with which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.interventions.mask import WeMask
from melayer.tuning.result import Method, Reference, Reward, TrainingProgress
from melayer.tuning.rewards import answer_format, correctness

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """What the three methods are asked alike, with the names that `melayer.sft`, `dpo` and `grpo` have for it."""

    method: Method
    out: Path
    mask: WeMask | None
    lora: bool | Mapping[str, Any] | LoraConfig
    config: Mapping[str, Any] | str | Path | None
    seed: int
    resume: bool
    parts: Mapping[str, str] | None
    name: str | None
    progress: TrainingProgress | None
    reference: Reference = "masked"
    rewards: Sequence[Reward] | None = None

    @property
    def reward_functions(self) -> list[Reward]:
        """What completions are judged by, in GRPO."""
        return [correctness, answer_format] if self.rewards is None else list(self.rewards)

    @property
    def reward_names(self) -> list[str]:
        """What these are called."""
        return [getattr(reward, "__name__", type(reward).__name__) for reward in self.reward_functions]
