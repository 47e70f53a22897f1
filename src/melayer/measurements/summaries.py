"""The first pass of every measurement: a summary of each row at each block's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Batch, Row, batches
from melayer.measurements.criterion import Criterion
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import Run, forward
from melayer.model.hooks import Point
from melayer.numerics.summary import Summary, stack, summarise
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    pass


# --- the first pass: summaries of every block --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SequenceSummary:
    """What is kept of one row: [n_layers + 1, ...], the embedding output first."""

    values: NDArray[np.float32]
    tokens: NDArray[np.int64]
    dims: NDArray[np.int64]
    median_abs: NDArray[np.float32]
    n_massive: NDArray[np.int64]
    top_norm: NDArray[np.float32]
    others_norm: NDArray[np.float32]
    n_non_finite: NDArray[np.int64]
    token_max: NDArray[np.float32]


def summaries_of(
    decoder: Decoder,
    rows: Sequence[Row],
    criterion: Criterion,
    *,
    k: int,
    max_batch_tokens: int,
    progress: Progress | None = None,
    around: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
    made: Callable[[int, Summary], None] = lambda place, summary: None,
    run: Run | None = None,
) -> dict[int, SequenceSummary]:
    """The summary of each row at the embedding output and at every block's output, by the row's index.

    Args:
        decoder: The model's parts.
        rows: The sequences to run.
        criterion: Its thresholds decide what is counted as massive.
        k: How many of the largest entries to keep for each row and block.
        max_batch_tokens: Tokens in one forward pass.
        progress: Called with the tokens done and the tokens in all.
        around: A context for each batch's forward pass, where another measurement listens in.
        made: Called with each summary once it is there, and its place: 0 for the embedding, then block by block.
        run: Runs a batch, in place of `forward`. Where it stops before the last block, so do the summaries.
    """
    points: list[tuple[int, Point]] = [(0, decoder.embedding_output)]
    points += [(block.layer + 1, block.sites["block_out"]) for block in decoder.blocks]
    total, done = sum(map(len, rows)), 0
    found: dict[int, SequenceSummary] = {}
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        seen: dict[int, Summary] = {}

        def see(layer: int, hidden: torch.Tensor, lengths: Sequence[int] = batch.lengths, into: Any = seen) -> None:
            into[layer] = summarise(hidden, lengths, min_abs=criterion.min_abs, min_ratio=criterion.min_ratio, k=k)
            made(layer, into[layer])

        with around(batch), hooks.watch(points, see):
            (run or forward)(decoder.model, batch)
        stacked = stack([seen[layer] for layer in range(len(seen))]).cpu()
        for place, row in enumerate(batch.rows):
            found[row.index] = SequenceSummary(
                **{key: getattr(stacked, key)[:, place].numpy() for key in SequenceSummary.__dataclass_fields__}
            )
        done += sum(batch.lengths)
        if progress is not None:
            progress(done, total)
    return found
