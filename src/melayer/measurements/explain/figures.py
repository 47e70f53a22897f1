"""The figures that `explain` gives, without a word about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from melayer.numerics.finite import ratio

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
class LayerFigures:
    """The figures of why one block has its massive value, in the first text; `texts` has the causes in each."""

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
    def passes_on(self) -> bool:
        """Whether it adds so little that a share of that says nothing."""
        return self.causes.attribution == "passed on"

    @property
    def added(self) -> float:
        """What the block adds to what stands at its input; what it takes away has the other sign."""
        return self.value - self.value_in

    def remaining_of(self, value: float) -> float | None:
        """The share of what the block adds that is left where the value is another one; None where it passes it on.

        What stands at the block's input is no work of the block's, and stands there whatever is taken from it.
        """
        return None if self.passes_on else ratio(value - self.value_in, self.added)

    def remaining(self, name: str) -> float | None:
        """The same in a counterfactual; None where it was not run."""
        return next((self.remaining_of(row.value) for row in self.counterfactuals if row.name == name), None)

    @property
    def interaction_added(self) -> float | None:
        """`interaction` relative to what the block adds instead of to the value."""
        of_added = None if self.passes_on else ratio(self.value, self.added)
        return None if self.interaction is None or of_added is None else self.interaction * of_added
