"""What `rigidity` found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from melayer.measurements.settings import RigiditySettings
from melayer.model.provenance import ModelInfo
from melayer.numerics.finite import mean_of_known
from melayer.presentation.numbers import number
from melayer.version import __version__


@dataclass(frozen=True)
class EffectiveRank:
    """How many directions the tokens of a sequence span at one site, mean over the sequences."""

    layer: int
    site: Literal["attn_in", "block_out"]
    with_massive: float | None
    """exp(entropy) of the squared singular values of all tokens; None where an activation is not finite."""
    without_massive: float | None
    """The same without the massive tokens; None where there is none."""
    entropy_with: float | None
    """In nats."""
    entropy_without: float | None


@dataclass(frozen=True)
class RigidityResult:
    """What `rigidity` found. Layers are 0-based; None stands where a cosine is of nothing finite."""

    model: ModelInfo
    settings: RigiditySettings
    me_layer: int | None
    erased_at: tuple[int, ...]
    n_sequences: int
    """The sequences whose massive token was followed; without an ME layer, all of them and their token 0."""
    cosine_next: tuple[float | None, ...]
    """[n_layers - 1] the token's state at each block's output against that at the next one's."""
    cosine_peak: tuple[float | None, ...]
    """[n_layers] the same against its state where the norm peaks."""
    cosine_inputs: tuple[float | None, ...]
    """[n_layers] mean pairwise cosine of the first token's state over the different first tokens."""
    cosine_inputs_massive: tuple[float | None, ...]
    """[n_layers] the same over those alone that become massive; all None where fewer than two do."""
    fixed_first_token: bool
    n_first_tokens: int
    n_massive_first_tokens: int | None
    """How many of them exceed the criterion's `min_abs` at the ME layer; None without one, or where it is fixed."""
    effective_rank: tuple[EffectiveRank, ...]
    tokens: float | None
    """The median number of tokens of the sequences in `effective_rank`, which it depends on."""
    n_rank_sequences: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        inputs = self._inputs_sentence()
        if self.me_layer is None:
            lowest = _lowest(self.cosine_next)
            least = "is not known" if lowest is None else f"is at least {_at_least(lowest)}"
            return (
                "There is no ME layer, so token 0 of each text was followed: its cosine between neighbouring blocks "
                f"{least}; {inputs}."
            )
        last = self.rigid_until
        assert last is not None
        lowest = _lowest(self.cosine_next[self.me_layer : last])
        if lowest is None:
            kept = f"The massive token could not be compared between blocks after the ME layer (block {self.me_layer})"
        else:
            kept = (
                f"From block {self.me_layer} (the ME layer) to block {last} the massive token's cosine between "
                f"neighbouring blocks is at least {_at_least(lowest)}"
            )
        ranks = [
            f"{with_massive:.1f} in {where} ({without:.1f} without them)"
            for where, (with_massive, without) in {
                "the residual stream": self.mean_rank("block_out"),
                "what attention reads": self.mean_rank("attn_in"),
            }.items()
            if with_massive is not None and without is not None
        ]
        rank = f"; after it the effective rank with the massive tokens is {' and '.join(ranks)}" if ranks else ""
        return f"{kept}; {inputs}{rank}."

    @property
    def rigid_until(self) -> int | None:
        """The last block before the massive state is erased, or the last of all; None without an ME layer."""
        if self.me_layer is None:
            return None
        return next((layer for layer in self.erased_at if layer > self.me_layer), self.model.n_layers) - 1

    def mean_rank(self, site: Literal["attn_in", "block_out"]) -> tuple[float | None, float | None]:
        """The effective rank with and without the massive tokens, mean over the blocks after the ME layer if any."""
        if self.me_layer is None:
            return None, None
        after = [row for row in self.effective_rank if row.site == site and row.layer > self.me_layer]
        return (
            mean_of_known(row.with_massive for row in after),
            mean_of_known(row.without_massive for row in after),
        )

    def _inputs_sentence(self) -> str:
        if self.fixed_first_token:
            return "the first token is the same in every text, so over inputs its cosine is 1 by causality"
        massive = "" if self.me_layer is None else f" ({self.n_massive_first_tokens} become massive)"
        at = self.me_layer if self.me_layer is not None else self.model.n_layers - 1
        before = "" if at == 0 or self.me_layer is None else f"{_shown(self.cosine_inputs[at - 1])} before it and "
        where = "there" if self.me_layer is not None else f"after block {at}"
        alone = self.cosine_inputs_massive[at]
        all_massive = self.n_massive_first_tokens == self.n_first_tokens
        among = "" if alone is None or all_massive else f" (among the massive ones {number(alone, 3)})"
        return (
            f"over {self.n_first_tokens} first tokens{massive} the mean pairwise cosine is {before}"
            f"{_shown(self.cosine_inputs[at])} {where}{among}"
        )


def _lowest(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _at_least(value: float) -> str:
    """Four digits, rounded down: rounding up would promise too much."""
    return f"{math.floor(value * 1e4) / 1e4:.4f}"


def _shown(value: float | None) -> str:
    return number(value, 3, absent="not known")
