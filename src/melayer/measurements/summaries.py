"""The first pass of every measurement: a summary of each row at the embedding's and at every block's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Batch, Row
from melayer.measurements.criterion import Criterion
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import Run, forward
from melayer.model.hooks import Point
from melayer.numerics.summary import Summary, stack, summarise
from melayer.runs.progress import Progress


@dataclass(frozen=True, eq=False)
class SequenceSummary:
    """What is kept of one row, on the host; in front of every field the embedding's output, then each block's.

    The fields are those of `numerics.summary.Summary`, whose batch they lack: [1 + blocks run] and on.
    """

    values: NDArray[np.float32]
    """[1 + blocks run, k]"""
    tokens: NDArray[np.int64]
    """[1 + blocks run, k]"""
    dims: NDArray[np.int64]
    """[1 + blocks run, k]"""
    median_abs: NDArray[np.float32]
    n_massive: NDArray[np.int64]
    top_norm: NDArray[np.float32]
    others_norm: NDArray[np.float32]
    n_non_finite: NDArray[np.int64]
    token_max: NDArray[np.float32]
    """[1 + blocks run, MAP_TOKENS]"""
    massive_tokens: NDArray[np.uint8]
    """[1 + blocks run, n_bytes] which of all tokens hold a massive scalar, a bit each; see `massive_at`."""

    @property
    def n_run(self) -> int:
        """How many blocks were run."""
        return len(self.n_massive) - 1

    def massive_at(self, layer: int) -> list[int]:
        """The tokens that hold a massive scalar at a block's output, every one of them."""
        return np.flatnonzero(np.unpackbits(self.massive_tokens[layer + 1])).tolist()


class MassiveDims:
    """How many massive scalars each dimension holds, over all rows that are finite, and their sum.

    Its `add` is an `on_summary` of `summaries_of`. It waits for no device: what it adds up stays where the block is.
    """

    def __init__(self) -> None:
        """Nothing was added yet."""
        self._by_place: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, place: int, summary: Summary) -> None:
        """Adds a batch's rows at one place."""
        more = summary.massive_in_dim, summary.massive_sum
        counts, sums = self._by_place.get(place, (0, 0))
        self._by_place[place] = (counts + more[0], sums + more[1])

    def at(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """[d_model] the counts and the sums at a block's output, on the host."""
        counts, sums = self._by_place[layer + 1]
        return counts.cpu().numpy(), sums.cpu().numpy().astype(np.float64)


def summaries_of(
    decoder: Decoder,
    passes: Sequence[Batch],
    criterion: Criterion,
    *,
    k: int,
    progress: Progress | None = None,
    during_batch: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
    on_summary: Callable[[int, Summary], None] = lambda place, summary: None,
    run_batch: Run = forward,
) -> dict[int, SequenceSummary]:
    """The summary of each row at the embedding's output and at every block's, by the row's index.

    Args:
        decoder: The model's parts.
        passes: What to run, a forward pass each; see `data.rows.batches`.
        criterion: Its thresholds decide what is counted as massive.
        k: How many of the largest entries to keep for each row and block.
        progress: Called with the tokens done and the tokens in all.
        during_batch: A context for each batch's forward pass, where another measurement listens in.
        on_summary: Called with each summary once it is there, and its place: 0 for the embedding, then block by block.
        run_batch: Runs a batch. Where it stops before the last block, so do the summaries.
    """
    points: list[tuple[int, Point]] = [(0, decoder.embedding_output)]
    points += [(block.layer + 1, block.sites["block_out"]) for block in decoder.blocks]
    total, done = sum(sum(batch.lengths) for batch in passes), 0
    by_row: dict[int, SequenceSummary] = {}
    for batch in passes:
        by_place: dict[int, Summary] = {}

        def see(place: int, hidden: torch.Tensor, lengths: Sequence[int] = batch.lengths, into: Any = by_place) -> None:
            into[place] = summarise(hidden, lengths, min_abs=criterion.min_abs, min_ratio=criterion.min_ratio, k=k)
            on_summary(place, into[place])

        with during_batch(batch), hooks.watch(points, see):
            run_batch(decoder.model, batch)
        stacked = stack([by_place[place] for place in range(len(by_place))]).cpu()
        for number, row in enumerate(batch.rows):
            of_row = {item.name: getattr(stacked, item.name)[:, number].numpy() for item in fields(SequenceSummary)}
            bits = np.packbits(of_row.pop("massive_tokens")[:, : len(row)], axis=-1)
            by_row[row.index] = SequenceSummary(**of_row, massive_tokens=bits)
        done += sum(batch.lengths)
        if progress is not None:
            progress(done, total)
    return by_row


def holding_of(rows: Sequence[Row], summaries: Mapping[int, SequenceSummary]) -> NDArray[np.bool_]:
    """[n_sequences, blocks run] whether each row holds a massive scalar at each block's output.

    Where a row holds a NaN or an infinity, nothing is said of it: then it does not.
    """
    in_order = [summaries[row.index] for row in rows]
    return np.stack([(summary.n_massive[1:] > 0) & (summary.n_non_finite[1:] == 0) for summary in in_order])
