"""What `explain` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from melayer.data.rows import visible
from melayer.measurements.settings import ExplainSettings
from melayer.model.provenance import ModelInfo
from melayer.version import __version__

Attribution = Literal["ffn", "gamma", "post_gamma", "joint", "attention", "passed on", "unknown"]


@dataclass(frozen=True)
class BudgetStep:
    """One step of a branch: log10 of the norm after it over the norm before it."""

    step: str
    massive: float
    others: float | None
    """The same of the median norm of the other tokens; None where there are none."""
    excess: float | None
    """massive - others."""


@dataclass(frozen=True)
class Neuron:
    """What one neuron writes into the massive dimension."""

    neuron: int
    share: float
    """Of the FFN's output there, before a post-norm."""
    contribution: float
    expert: int | str | None


@dataclass(frozen=True)
class Driver:
    """What one input dimension adds to a pre-activation of the top neuron."""

    projection: Literal["gate", "up"]
    dim: int
    contribution: float
    """x * weight, x what the FFN reads (gamma included)."""
    share: float | None
    """Of the whole pre-activation."""
    gamma: float | None


@dataclass(frozen=True)
class Counterfactual:
    """The value when the block runs again with one thing changed."""

    name: str
    value: float
    relative: float | None
    """Of the value as it is."""
    lowest: float | None = None
    """The smallest value over the seeds; None where there is only one run."""
    highest: float | None = None


@dataclass(frozen=True)
class Direction:
    """How far the FFN's write lies along a left singular vector of its down projection."""

    rank: int
    singular_value: float
    cosine: float
    """Its magnitude: the sign of a singular vector means nothing."""


@dataclass(frozen=True)
class ExpertUse:
    """One expert that the massive token visits."""

    expert: int | str
    weight: float | None
    share: float | None
    """Of the FFN's output in the massive dimension."""


@dataclass(frozen=True)
class Causes:
    """What creates the value, from figures alone; docs/explain.md has the formulas."""

    attribution: Attribution
    attn_share: float | None
    """Of what the block adds to the massive dimension, written there by attention (or another token mixer)."""
    ffn_share: float | None
    ffn_alone: float | None
    """Share of the FFN's write that is left when every gamma around the FFN is flat."""
    gamma_alone: float | None
    """Share that is left, more than without all three, when only the pre-norm's gamma is kept."""
    post_gamma_alone: float | None
    """The same for the post-norm's gamma."""
    jointly: float | None
    """The rest: what needs more than one of them."""


@dataclass(frozen=True)
class TextCauses:
    """The causes in one of the texts."""

    sequence: int
    token_index: int
    token: str
    dim: int
    value: float
    causes: Causes


@dataclass(frozen=True)
class LayerExplanation:
    """Why one block has its massive value, in the first text; `texts` says the causes in each."""

    layer: int
    sequence: int
    token_index: int
    token: str
    d_star: int
    value: float
    """The value explained: the massive token's, in dimension `d_star`, at this block's output."""
    value_in: float
    """What stands there at its input."""
    attn_write: float
    ffn_write: float | None
    causes: Causes
    norm: str | None
    """RMSNorm or LayerNorm before the FFN; None where it has none."""
    budget: tuple[BudgetStep, ...]
    attn_budget: tuple[BudgetStep, ...]
    neurons: tuple[Neuron, ...]
    bias_share: float | None
    rest_share: float | None
    """The share of all neurons that are not listed."""
    super_weight: tuple[int, int, int] | None
    """(layer, dimension, neuron) of the weight behind the heaviest contribution (Yu et al. 2024, arXiv:2411.07191)."""
    super_weight_expert: int | str | None
    drivers: tuple[Driver, ...]
    counterfactuals: tuple[Counterfactual, ...]
    interaction: float | None
    """Effect of flat gamma and no top two neurons together, less both effects alone; relative to the value."""
    directions: tuple[Direction, ...]
    experts: tuple[ExpertUse, ...]
    texts: tuple[TextCauses, ...]
    notes: tuple[str, ...]

    def relative(self, name: str) -> float | None:
        """What is left of the value in a counterfactual; None where it was not run."""
        return next((row.relative for row in self.counterfactuals if row.name == name), None)

    @property
    def erases(self) -> bool:
        """Whether the block takes from what stands at its input instead of adding to it."""
        return self.value_in * (self.value - self.value_in) < 0 and abs(self.value) < abs(self.value_in)

    @property
    def sentence(self) -> str:
        """Why, in one sentence computed from the figures."""
        causes = self.causes
        one, many = ("lowers", "lower") if self.erases else ("creates", "create")
        who = {
            "ffn": f"the FFN alone {one} it",
            "gamma": f"{self.norm}'s gamma alone {one} it",
            "post_gamma": f"the gamma of the norm after the FFN alone {one} it",
            "joint": f"norm and FFN {many} it jointly",
            "attention": f"attention {one} it",
            "passed on": "it stands there already and the block passes it on",
            "unknown": f"what {one} it could not be told",
        }[causes.attribution]
        without = [
            (f"{self.norm}'s gamma (flat)", self.relative("gamma_flat_1.0")),
            ("the post-norm's gamma (flat)", self.relative("post_gamma_flat_1.0")),
            ("the top two neurons", self.relative("no_top_2")),
            ("attention", self.relative("no_attention") if causes.attribution == "attention" else None),
        ]
        left = [f"without {what} {share:.1%}" for what, share in without if share is not None]
        alone = [
            ("FFN alone", causes.ffn_alone),
            (f"{self.norm}'s gamma", causes.gamma_alone),
            ("post-norm's gamma", causes.post_gamma_alone),
            ("jointly", causes.jointly),
        ]
        parts = [f"{what} {share:.1%}" for what, share in alone if share is not None]
        remains = f"; {', '.join(left)} of the value {'stands' if self.erases else 'remains'}" if left else ""
        came = f"{self.value_in:,.0f} to " if self.erases else ""
        of_write = f"; of the FFN's write: {', '.join(parts)}" if parts else ""
        return (
            f"Block {self.layer}: {who} (token {self.token_index} “{visible(self.token)}”, dimension {self.d_star}, "
            f"{came}{self.value:,.0f}){remains}{of_write}."
        )


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
        layers = []
        for layer in self.layers:
            plain = asdict(layer)
            layers.append({**plain.pop("causes"), **plain, "erases": layer.erases, "sentence": layer.sentence})
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
