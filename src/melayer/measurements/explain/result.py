"""What `explain` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from melayer.measurements.explain.figures import LayerFigures
from melayer.measurements.explain.words import sentence
from melayer.measurements.settings import ExplainSettings
from melayer.model.provenance import ModelInfo
from melayer.version import __version__


@dataclass(frozen=True)
class LayerExplanation(LayerFigures):
    """Why one block has its massive value, in the first text; `texts` says the causes in each."""

    @property
    def sentence(self) -> str:
        """Why, in one sentence computed from the figures."""
        return sentence(self)

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain values."""
        plain = asdict(self)
        for row in plain["counterfactuals"]:
            row["remaining"] = self.remaining_of(row["value"])
        more = {"interaction_added": self.interaction_added, "erases": self.erases, "sentence": self.sentence}
        return {**plain.pop("causes"), **plain, **more}


@dataclass(frozen=True)
class ExplainResult:
    """What `explain` found. Layers are 0-based."""

    model: ModelInfo
    settings: ExplainSettings
    me_layer: int | None
    layers: tuple[LayerExplanation, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        layers = [layer.to_dict() for layer in self.layers]
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": self.settings,
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "layers": _with_lists(layers),
            "notes": list(self.notes),
        }

    @property
    def sentence(self) -> str:
        """The answer, computed from the figures: a sentence for each layer."""
        if self.layers:
            return " ".join(layer.sentence for layer in self.layers)
        if self.me_layer is None and self.settings["layers"] is None:
            return (
                "There is no ME layer, so there is nothing to explain; any block is explained when asked for by number."
            )
        return "None of the layers could be explained; the notes say why."


def _with_lists(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
