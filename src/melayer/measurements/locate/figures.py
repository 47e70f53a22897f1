"""The figures that `locate` gives, without a word about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from melayer.measurements.criterion import STAGE_SHARE, Criterion
from melayer.measurements.settings import LocateSettings
from melayer.model.provenance import ModelInfo

Emergence = Literal["single", "staged", "gradual", "none"]


Start = Literal["as run", "no bos", "bos", "template"]
"""What stands first: as the texts are run, their own first token, BOS, or the first token of the chat template."""


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
    """Massive scalars over all sequences: all, however few are listed."""
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
class MassiveDim:
    """The massive scalars of one dimension at one block's output, all of them, over all sequences."""

    layer: int
    dim: int
    n: int
    mean: float


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
class Peak:
    """The largest |h| at any block's output, over the sequences that vote and hold, and who created it."""

    layer: int
    sequence: int
    token_index: int
    token: str
    dim: int
    max_abs: float
    me_share: float
    """The share of the peak state that the ME layer's block adds: of the token that holds the peak in its sequence,
    mean over the sequences."""
    standing_share: float
    """The share of it that stands at the ME layer's output: the embedding's and that of all blocks up to there."""
    emergence: Emergence
    """As `LocateResult.emergence`, of the tokens that hold the peak."""
    shares: tuple[Stage, ...]
    """As `LocateResult.shares`, of the tokens that hold the peak."""
    embedding_share: float
    n_sequences: int
    n_other_token: int
    """In how many of the sequences the peak is in another token than the largest |h| at the ME layer's output."""
    n_other_dim: int
    """In how many it is in another dimension."""

    @property
    def moves_token(self) -> bool:
        """Whether the peak is in another token in most sequences."""
        return 2 * self.n_other_token > self.n_sequences

    @property
    def moves_dim(self) -> bool:
        """Whether it is in another dimension in most sequences."""
        return 2 * self.n_other_dim > self.n_sequences

    def to_dict(self) -> dict[str, Any]:
        """The peak as plain values, of the shares the stages alone."""
        values = asdict(self)
        values["stages"] = [share for share in values.pop("shares") if share["share"] >= STAGE_SHARE]
        return values


@dataclass(frozen=True)
class FirstToken:
    """What is found with one first token in a few short texts."""

    kinds: tuple[Start, ...]
    """What it is: two of them can be the same token."""
    token: str | None
    """None where each text has its own."""
    me_layer: int | None
    n_holding: int
    """In how many texts the criterion holds at the ME layer; without one, at any block."""
    n_first_massive: int
    """In how many the first token is massive there."""
    max_abs: float | None
    """The largest |h| at any block's output, with its place."""
    layer: int
    massive_token_index: int
    massive_token: str
    dim: int


@dataclass(frozen=True)
class FirstTokens:
    """The same texts with every first token that they can have."""

    n_sequences: int
    max_tokens: int
    rows: tuple[FirstToken, ...]
    """As they are run first."""
    notes: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[FirstToken, ...]:
        """Those with which something else is found than with the texts as they are run: another ME layer or none, or
        the first token massive in most of them where it is not, or the other way round."""
        as_run = self._finding(self.rows[0])
        return tuple(row for row in self.rows[1:] if self._finding(row) != as_run)

    def first_is_massive(self, row: FirstToken) -> bool:
        """Whether it is in most of the texts."""
        return 2 * row.n_first_massive > self.n_sequences

    def _finding(self, row: FirstToken) -> tuple[int | None, bool]:
        return row.me_layer, self.first_is_massive(row)

    def to_dict(self) -> dict[str, Any]:
        """What was found, as plain values."""
        rows = [{**asdict(row), "kinds": list(row.kinds)} for row in self.rows]
        sizes = {"n_sequences": self.n_sequences, "max_tokens": self.max_tokens}
        return {**sizes, "flips": bool(self.differing), "rows": rows, "notes": list(self.notes)}


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
    massive_tokens: tuple[int, ...] = ()
    """All tokens that hold a massive scalar at the output of the ME layer or of a later block; of any block where
    there is no ME layer."""


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
class LocateFigures:
    """The figures of a located result. Layers are 0-based throughout."""

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
    massive_dims: tuple[MassiveDim, ...] = ()
    """Every dimension with a massive scalar at each block's output. `massive` is cut to what people read; this is not,
    and neither are `BlockRow.n_massive` and `SequenceRow.massive_tokens`."""
    least_threshold: float | None = None
    """The lowest threshold of a sequence that holds at the ME layer's output: every massive scalar there exceeds it."""
    peak: Peak | None = None
    """None where there is no ME layer, or no growth could be followed."""
    first_tokens: FirstTokens | None = None
    """None where other first tokens were not looked at."""

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
    def n_massive(self) -> int:
        """The massive scalars over all blocks and sequences, of which `massive` lists some."""
        return sum(row.n_massive for row in self.blocks)
