"""What `locate` found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from melayer.data.rows import visible
from melayer.measurements.criterion import Criterion
from melayer.measurements.settings import LocateSettings, criterion_settings
from melayer.model.provenance import ModelInfo
from melayer.version import __version__

Emergence = Literal["single", "staged", "gradual", "none"]


@dataclass(frozen=True)
class BlockRow:
    """The largest |h| at a block's output over all sequences, and what it stands against in its own sequence."""

    layer: int
    max_abs: float | None
    """None where the output is not finite: a maximum over the rest would hide that."""
    sequence: int
    token_index: int
    token: str
    dim: int
    median_abs: float | None
    ratio: float | None
    top_norm: float | None
    """The norm of the token that holds the largest |h|."""
    others_norm: float | None
    """The median norm of the other tokens of that sequence."""
    n_massive: int
    """Massive scalars over all sequences."""
    n_holding: int
    """Sequences with at least one of them, among those that vote."""
    n_non_finite: int
    """Tokens that hold a NaN or an infinity, over all sequences."""


@dataclass(frozen=True)
class MassiveScalar:
    """One scalar that meets the criterion."""

    layer: int
    sequence: int
    token_index: int
    token: str
    dim: int
    value: float


@dataclass(frozen=True)
class Stage:
    """A block that adds a share of the massive token's peak state, along its direction."""

    layer: int
    share: float
    attn_share: float | None
    """The part that attention writes; None where the block has no softmax attention."""
    ffn_share: float | None
    """The part that the FFN writes; None where the block has none."""


@dataclass(frozen=True)
class SequenceRow:
    """What happened in one sequence."""

    index: int
    text: str
    n_tokens: int
    n_dropped: int
    first_token: str
    has_bos: bool
    votes: bool
    """Whether it is long enough for the criterion to mean something."""
    holds: bool | None
    """Whether the criterion holds at the ME layer; None if there is no ME layer."""
    massive_token_index: int | None
    massive_token: str | None
    emergence: Emergence | None


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or infinity, in the order in which the model computes."""

    layer: int | None
    """The block whose output holds it; None for the embedding."""
    sequence: int
    token_index: int
    dim: int
    value: str


@dataclass(frozen=True, eq=False)
class Trace:
    """The trajectory of one token through the blocks, for pictures; not part of `to_dict()`."""

    sequence: int
    token_index: int
    token: str
    states: NDArray[np.float32]
    """[n_layers, d_model] its state at each block's output."""
    token_max: NDArray[np.float32]
    """[n_layers, tokens] the largest |h| of each of the first tokens of its sequence."""
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class LocateResult:
    """What `locate` found. Layers are 0-based throughout."""

    model: ModelInfo
    criterion: Criterion
    settings: LocateSettings
    me_layer: int | None
    emergence: Emergence
    stages: tuple[Stage, ...]
    erased_at: tuple[int, ...]
    """Empty, and null in `to_dict()`, where the run was stopped before the last block."""
    peak_layer: int | None
    """Where the massive token's norm peaks."""
    shares: tuple[Stage, ...]
    """The share of every block, mean over the sequences in which the criterion holds; empty if it holds in none."""
    embedding_share: float | None
    """The share that is there before block 0; with `shares` up to the peak it adds up to 1."""
    blocks: tuple[BlockRow, ...]
    embedding_max_abs: float | None
    massive: tuple[MassiveScalar, ...]
    sequences: tuple[SequenceRow, ...]
    non_finite: NonFinite | None
    notes: tuple[str, ...]
    trace: Trace | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": {"criterion": criterion_settings(self.criterion), **self.settings},
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "emergence": self.emergence,
            "stages": [asdict(stage) for stage in self.stages],
            "erased_at": list(self.erased_at) if self.complete else None,
            "peak_layer": self.peak_layer,
            "shares": [asdict(stage) for stage in self.shares],
            "embedding_share": self.embedding_share,
            "blocks": [asdict(row) for row in self.blocks],
            "embedding_max_abs": self.embedding_max_abs,
            "massive": [asdict(scalar) for scalar in self.massive],
            "sequences": [asdict(row) for row in self.sequences],
            "non_finite": asdict(self.non_finite) if self.non_finite else None,
            "notes": list(self.notes),
        }

    @property
    def complete(self) -> bool:
        """Whether every block was run. `locate_frugal` can stop before: then `blocks` ends where it stopped."""
        return len(self.blocks) == self.model.n_layers

    @property
    def massive_above(self) -> float:
        """What a token's largest |h| at the ME layer's output must exceed to be massive, as one constant.

        The larger of `min_abs` and `min_ratio` medians of that block: a median over the tokens at hand would let one
        depend on those beside and behind it.
        """
        median = 0.0 if self.me_layer is None else self.blocks[self.me_layer].median_abs or 0.0
        return float(self.criterion.threshold(median))

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        if self.non_finite is not None:
            where = "the embedding" if self.non_finite.layer is None else f"the output of block {self.non_finite.layer}"
            return (
                f"Non-finite activations in {self.model.dtype}: the first ({self.non_finite.value}) is in {where}, "
                f"text {self.non_finite.sequence}, token {self.non_finite.token_index}, dimension "
                f"{self.non_finite.dim}; nothing that depends on it was judged."
            )
        if self.me_layer is None:
            strongest = max(self.blocks, key=lambda row: row.ratio or 0.0)
            if not any(row.n_massive for row in self.blocks):
                return (
                    "No massive activation was found: the largest ratio to the median is "
                    f"{strongest.ratio or 0:,.0f} (block {strongest.layer}, |h| = {strongest.max_abs or 0:,.1f}), "
                    f"the criterion asks for {self.criterion.min_ratio:,.0f} and |h| > {self.criterion.min_abs:,.0f}."
                )
            return (
                f"There is no ME layer: the criterion holds in places (most strongly after block {strongest.layer}), "
                "but nowhere in enough sequences for long enough."
            )
        row = self.blocks[self.me_layer]
        how = {
            "single": "this one block creates it",
            "staged": f"it is created in stages (blocks {', '.join(str(stage.layer) for stage in self.stages)})",
            "gradual": "it grows gradually over many blocks",
            "none": "its growth could not be followed",
        }[self.emergence]
        erased = f", and it is erased at {_blocks(self.erased_at)}" if self.erased_at else ""
        if not self.complete:
            erased = f"; nothing behind block {self.blocks[-1].layer} was run"
        # A stream of mostly zeros has a median of 0, and no ratio to it.
        ratio = "the median is 0" if row.ratio is None else f"{row.ratio:,.0f} times the median"
        return (
            f"The ME layer is block {self.me_layer} of {self.model.n_layers} (0-based): there token "
            f"{row.token_index} (“{visible(row.token)}”) reaches |h| = {row.max_abs:,.0f} in dimension {row.dim}, "
            f"{ratio}; {how}{erased}."
        )


def _blocks(layers: Sequence[int]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
