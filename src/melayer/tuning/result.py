"""What a training run did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from melayer.interventions.mask import WeMask
from melayer.model.provenance import ModelInfo
from melayer.tuning import rows, run_directory
from melayer.tuning.settings import TuneSettings
from melayer.version import __version__

Method = rows.Method
Reference = Literal["masked", "plain"]
Reward = Callable[..., list[float]]
TrainingProgress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the steps done, the steps in all, and the figures of the last one."""


@dataclass(frozen=True)
class TuneResult:
    """What a run did. The model is in `out`: `melayer.load(result.out)` brings it back with its mask."""

    method: Method
    out: str
    model: ModelInfo
    """The model that training began with."""
    mask: WeMask | None
    reference: Reference | None
    """How the reference model was treated; None where the method, or beta = 0, needs none."""
    adapter: bool
    """Whether `out` holds a LoRA adapter, and not all weights."""
    steps: int
    first: Mapping[str, float]
    """The figures of the first logged step."""
    last: Mapping[str, float]
    """The figures of the last logged step."""
    validation: tuple[Mapping[str, float], ...]
    """The figures of each evaluation, in order, with its `step`."""
    resumed_from: int | None
    """The step of the checkpoint that the run went on from."""
    seconds: float
    """Of this call; a run that went on took longer in all."""
    settings: TuneSettings
    versions: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        key = "reward" if self.method == "grpo" else "loss"
        under = "without a mask" if self.mask is None else f"under a mask ({self.mask.selector} {self.mask.rate:g})"
        start, end = self.first.get(key), self.last.get(key)
        if start is None or end is None:
            return f"{self.steps} steps of {self.method} {under}."
        return f"{self.steps} steps of {self.method} {under}: the {key} went from {start:.4g} to {end:.4g}."

    def history(self) -> list[dict[str, Any]]:
        """Each line of the log: `step`, and what the trainer measured there."""
        return run_directory.read_log(Path(self.out))
