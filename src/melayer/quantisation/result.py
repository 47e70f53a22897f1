"""What `quant_check` found, and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melayer.interventions.baked_prefix import BakedPrefix
from melayer.model.provenance import ModelInfo
from melayer.numerics.grids import Format
from melayer.numerics.paired import Difference
from melayer.quantisation.calibration import ABOUT, TENSORS, Granularity, ScaleSet, write_scales
from melayer.quantisation.linear_inputs import LinearInput, joined
from melayer.quantisation.settings import QuantCheckSettings
from melayer.quantisation.treatments import BAKED, Treatment
from melayer.version import __version__


@dataclass(frozen=True)
class PerplexityScore:
    """How well the model predicts. None where a loss is not finite."""

    nll: float | None
    """Mean negative log-likelihood of a predicted token, in nats."""
    perplexity: float | None
    by_sequence: tuple[float | None, ...] = field(repr=False)
    """The sum over each sequence's tokens, in nats."""


@dataclass(frozen=True)
class Setting:
    """One way to quantise, and what it does."""

    format: Format
    granularity: Granularity
    treatment: Treatment
    score: PerplexityScore
    cost: Difference | None
    """Against the unquantised model; None where the loss is not finite, here and below."""
    against_plain: Difference | None
    """Against the same grid and granularity without any treatment."""
    by_mask: Difference | None
    """Of a masked treatment against the same without the mask."""
    error: tuple[float | None, ...]
    """For each linear input sqrt(sum (x - Q(x))^2 / sum x^2) over the ordinary tokens behind the prefix."""
    error_apart: tuple[float | None, ...]
    """The same over the prefix, where it runs quantised, and the massive tokens elsewhere."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Setting:
        """A setting by itself, from what `asdict` made of it; what it is compared with is not in there."""
        score = values["score"]
        kept = PerplexityScore(score["nll"], score["perplexity"], tuple(score["by_sequence"]))
        names = (values["format"], values["granularity"], values["treatment"])
        return cls(*names, kept, None, None, None, tuple(values["error"]), tuple(values["error_apart"]))

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.format} {self.granularity} {self.treatment}"

    @property
    def scale_set(self) -> ScaleSet:
        """By what its scales, and itself, are looked up."""
        return ScaleSet(self.treatment, self.format, self.granularity)

    @property
    def median_error(self) -> float | None:
        """Over the linear inputs."""
        known = [value for value in self.error if value is not None]
        return float(np.median(known)) if known else None


@dataclass(frozen=True)
class TreatmentEffect:
    """What a treatment does to a setting."""

    format: Format
    granularity: Granularity
    what: str
    by: Difference

    @property
    def verdict(self) -> str:
        """As far as the interval shows it."""
        if not self.by.shown:
            return "not shown"
        return "gives back" if self.by.value < 0 else "costs"


@dataclass(frozen=True)
class InputRow:
    """One linear input as the result names it."""

    layer: int
    paths: tuple[str, ...]
    width: int

    @property
    def label(self) -> str:
        """What to call it."""
        return f"block {self.layer} {joined(self.paths)}"


@dataclass(frozen=True)
class Prefix:
    """What every sequence begins with."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    massive: tuple[bool, ...]
    """Of each token, in the plain model."""


@dataclass(frozen=True)
class Elsewhere:
    """The massive tokens behind the prefix, which a fixed prefix cannot hold."""

    n: int
    n_tokens: int
    """Tokens behind the prefix in all."""


@dataclass(frozen=True)
class QuantCheckResult:
    """What `quant_check` found. Layers are 0-based."""

    model: ModelInfo
    settings: QuantCheckSettings
    me_layer: int | None
    T: int
    n_sequences: int
    n_calibration: int
    n_predicted: int
    """Tokens that every setting predicts, the same for each."""
    prefix: Prefix
    elsewhere: Mapping[str, Elsewhere]
    """Of the `calibration` and the `evaluation` sequences."""
    unquantised: PerplexityScore
    unquantised_mask: PerplexityScore | None
    """Under the mask; None where no treatment has one."""
    inputs: tuple[InputRow, ...]
    rows: tuple[Setting, ...]
    """By format, granularity and treatment, in the order asked for."""
    notes: tuple[str, ...]
    linear_inputs: tuple[LinearInput, ...] = field(compare=False, repr=False)
    calibrated: Mapping[ScaleSet, tuple[torch.Tensor, ...]] = field(compare=False, repr=False)
    """The scales of every static setting; not part of `to_dict()`, see `save`."""
    baked: Mapping[Treatment, BakedPrefix] = field(compare=False, repr=False)
    """The prefixes of the baked treatments."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": self.settings,
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "T": self.T,
            "n_sequences": self.n_sequences,
            "n_calibration": self.n_calibration,
            "n_predicted": self.n_predicted,
            "prefix": asdict(self.prefix),
            "massive_elsewhere": {key: asdict(massive) for key, massive in self.elsewhere.items()},
            "unquantised": asdict(self.unquantised),
            "unquantised_mask": None if self.unquantised_mask is None else asdict(self.unquantised_mask),
            "inputs": [asdict(row) for row in self.inputs],
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def find(self, format: str, granularity: str, treatment: str) -> Setting | None:
        """The setting, if it was measured."""
        wanted = (format, granularity, treatment)
        return next((row for row in self.rows if (row.format, row.granularity, row.treatment) == wanted), None)

    def worst(self, row: Setting, n: int = 3) -> list[tuple[InputRow, float]]:
        """The linear inputs with the largest errors, worst first."""
        known = [(at, value) for at, value in zip(self.inputs, row.error, strict=True) if value is not None]
        return sorted(known, key=lambda pair: -pair[1])[:n]

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures of the first format and granularity."""
        first = self.rows[0]
        same = [row for row in self.rows if (row.format, row.granularity) == (first.format, first.granularity)]
        said = ", ".join(f"{shown(row.score.perplexity)} {_WORDS[row.treatment]}" for row in same)
        text = (
            f"Unquantised the perplexity is {shown(self.unquantised.perplexity)}; with {first.format} activations, "
            f"{_SCALED[first.granularity]}, it is {said}"
        )
        worst = self.worst(same[0], 1)
        if worst:
            text += f"; the worst site ({same[0].treatment}) is {worst[0][0].label}, off by {worst[0][1]:.1%}"
        return f"{text}."

    @property
    def changes(self) -> list[TreatmentEffect]:
        """For each format and granularity what baking and the mask change, where both sides were measured."""
        effects = []
        for row in self.rows:
            change = row.by_mask if row.treatment == "baked+mask" else row.against_plain
            if change is not None and row.treatment in _CHANGED:
                effects.append(TreatmentEffect(row.format, row.granularity, _CHANGED[row.treatment], change))
        return effects

    @staticmethod
    def files_of(directory: Path) -> list[Path]:
        """What `save` may write into a directory."""
        prefixes = [path for treatment in BAKED for path in BakedPrefix.files_of(directory / treatment)]
        return [directory / TENSORS, directory / ABOUT, *prefixes]

    def save(self, directory: str | Path) -> list[Path]:
        """Writes the scales of every static setting, and in a directory of its treatment's name each baked prefix.

        Left out is a prefix that cannot be kept as keys and values, see `notes`.

        Raises:
            OutputError: They cannot be written.
        """
        directory = Path(directory)
        about = {
            "model": self.model.to_dict(),
            "T": self.T,
            "left_out": {
                of: [
                    *([f"the prefix {list(self.prefix.ids)}"] if of in BAKED else []),
                    *([f"{self.elsewhere['calibration'].n} massive tokens elsewhere"] if of in BAKED else []),
                ]
                for of in self.settings["treatments"]
            },
            "prefix": asdict(self.prefix),
            "mask": self.settings["mask"],
            "calibration": self.settings["calibration"],
        }
        written = []
        if self.calibrated:
            written.append(write_scales(directory, self.linear_inputs, self.calibrated, about))
        for treatment, prefix in self.baked.items():
            if prefix.unwritable is None:  # `notes` says of the others why not
                written.append(prefix.save(directory / treatment))
        return written


_WORDS: Mapping[Treatment, str] = {
    "plain": "untreated",
    "baked": "with the prefix baked",
    "baked+mask": "with the prefix baked under the mask",
    "mask": "under the mask",
}
_SCALED: Mapping[Granularity, str] = {
    "per-tensor": "one static scale a tensor",
    "per-token": "a scale for each token",
    "per-channel": "one static scale a channel",
}
_CHANGED: Mapping[Treatment, str] = {
    "baked": "baking",
    "mask": "mask alone",
    "baked+mask": "mask beside baking",
}


def shown(perplexity: float | None) -> str:
    """A perplexity for people; quantised models may reach any size."""
    if perplexity is None:
        return "not finite"
    return f"{perplexity:,.2f}" if perplexity < 1e5 else f"{perplexity:.1e}"
