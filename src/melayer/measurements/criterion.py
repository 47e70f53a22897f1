"""What counts as massive, and which block is the ME layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from melayer.data.rows import Row
from melayer.errors import InputError

STAGE_SHARE = 0.10
"""A block that adds at least this share of the peak state is a stage; one that takes it away erases."""
WHOLE_SHARE = 0.90
"""What one block (single) or two or three stages together (staged) must add."""


LARGEST = 3.4e38
"""Activations are compared in float32, which has no threshold above."""


@dataclass(frozen=True)
class Criterion:
    """What counts as massive, and when a block is the ME layer.

    The thresholds of a massive activation are those of Sun et al. 2024 (arXiv:2402.17762); persistence and majority
    make "the first block after which it is there" exact (arXiv:2605.08504 counts that block as the ME layer).
    """

    min_abs: float = 100.0
    """|h| must be larger than this."""
    min_ratio: float = 1000.0
    """|h| must be larger than this many times the median |h| of its sequence at its block."""
    persistence: float = 0.25
    """The criterion must go on holding for at least this share of the blocks, the ME layer counted."""
    majority: float = 0.5
    """It must hold in more than this share of the sequences."""
    min_tokens: int = 8
    """A shorter sequence has too few ordinary tokens for its median to mean anything, and does not vote."""

    def __post_init__(self) -> None:
        """Refuse thresholds that no activation can meet or miss."""
        for name in ("min_abs", "min_ratio"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise InputError(
                    f"{name} is {getattr(self, name)}; expected a number from 0 to {LARGEST:g}, the largest of float32."
                )
        for name in ("persistence", "majority"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1.")

    def threshold(self, median_abs: float) -> float:
        """What |h| must exceed in a sequence whose median |h| at that block is `median_abs`."""
        return max(self.min_abs, self.min_ratio * median_abs)


def find_me_layer(
    n_holding: Sequence[int] | NDArray[np.int64],
    n_sequences: int,
    criterion: Criterion,
    *,
    n_layers: int | None = None,
) -> int | None:
    """The first block at which the criterion holds in a majority of the sequences, and goes on doing so.

    Args:
        n_holding: [blocks run] how many of the sequences hold a massive scalar at each block's output.
        n_sequences: How many sequences vote. Without any there is no ME layer.
        criterion: Its majority and persistence.
        n_layers: The model's blocks, where not all of them were run; what is found then no later block can change.
    """
    n_run = len(n_holding)
    if not (n_sequences and n_run):
        return None
    carried = np.asarray(n_holding) / n_sequences > criterion.majority
    whole = n_layers or n_run
    # By division, as the share is asked for: 0.07 * 100 is a little more than 7.
    needed = next(blocks for blocks in range(1, whole + 1) if blocks / whole >= criterion.persistence)
    return next((layer for layer in range(n_run - needed + 1) if carried[layer : layer + needed].all()), None)


def voting(rows: Sequence[Row], criterion: Criterion) -> list[int]:
    """The places of the sequences that decide on the ME layer: the long enough ones, or all where there are none."""
    return [row.index for row in rows if len(row) >= criterion.min_tokens] or [row.index for row in rows]
