"""Where massive tokens are in the sequences of a check: in which block they emerge, and which tokens they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from melayer.data.rows import Batch, Row, batches
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion, find_me_layer
from melayer.measurements.summaries import holding_of, summaries_of
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.quantisation.result import Elsewhere
from melayer.runs.progress import Progress


@dataclass(frozen=True, eq=False)
class Emergence:
    """What the calibration sequences say of massive tokens."""

    me_layer: int | None
    above: float
    """What a token's largest |h| at the ME layer's output must exceed to be massive."""
    flags: torch.Tensor
    """[n_sequences, T] which tokens of the calibration sequences do."""


def emergence(
    decoder: Decoder,
    rows: Sequence[Row],
    criterion: Criterion,
    *,
    max_batch_tokens: int,
    progress: Progress | None = None,
) -> Emergence:
    """The ME layer of these sequences, and their massive tokens.

    Args:
        decoder: The model's parts.
        rows: The sequences, of one length; `index` is their place.
        criterion: What counts as massive, and as the ME layer.
        max_batch_tokens: Tokens in one forward pass.
        progress: Called with the tokens done and the tokens in all.

    Raises:
        InputError: An activation is not finite.
    """
    largest: dict[int, dict[int, torch.Tensor]] = {}
    points = [(block.layer, block.sites["block_out"]) for block in decoder.blocks]

    @contextmanager
    def keeping_largest(batch: Batch) -> Iterator[None]:
        def see(layer: int, hidden: torch.Tensor) -> None:
            for row, values in zip(batch.rows, _largest(hidden), strict=True):
                largest.setdefault(layer, {})[row.index] = values

        with hooks.watch(points, see):
            yield

    passes = list(batches(rows, max_batch_tokens=max_batch_tokens))
    summaries = summaries_of(decoder, passes, criterion, k=1, progress=progress, during_batch=keeping_largest)
    for row in rows:
        bad = summaries[row.index].n_non_finite.nonzero()[0]
        if len(bad):
            raise InputError(
                f"The activations are not finite from the output of block {int(bad[0]) - 1} on, so they have no scale. "
                "Load the model in a wider dtype, or see melayer locate."
            )
    me_layer = find_me_layer(holding_of(rows, summaries).sum(axis=0), len(rows), criterion)
    if me_layer is None:
        return Emergence(None, 0.0, torch.zeros(len(rows), len(rows[0]), dtype=torch.bool))
    top = max(rows, key=lambda row: abs(float(summaries[row.index].values[me_layer + 1, 0])))
    above = criterion.threshold(float(summaries[top.index].median_abs[me_layer + 1]))
    return Emergence(me_layer, above, torch.stack([largest[me_layer][row.index] for row in rows]) > above)


def massive_tokens(
    decoder: Decoder, rows: Sequence[Row], me_layer: int | None, above: float, *, max_batch_tokens: int
) -> torch.Tensor:
    """[n_sequences, T] which tokens of other sequences are massive, by the same threshold at the same block."""
    flags = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
    if me_layer is None:
        return flags
    read: list[torch.Tensor] = []
    point = decoder.blocks[me_layer].sites["block_out"]
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        with hooks.watch([(0, point)], lambda _, hidden: read.append(_largest(hidden))):
            forward(decoder.model, batch)
        flags[[row.index for row in batch.rows]] = read.pop() > above
    return flags


def with_prefix(flags: torch.Tensor, n_prefix: int) -> torch.Tensor:
    """[n_sequences, T] the prefix and the massive tokens: what stands apart from the ordinary tokens."""
    excluded = flags.clone()
    excluded[:, :n_prefix] = True
    return excluded


def elsewhere(flags: torch.Tensor, n_prefix: int) -> Elsewhere:
    """How many tokens behind the prefix are massive."""
    behind = flags[:, n_prefix:]
    return Elsewhere(int(behind.sum()), behind.numel())


def _largest(hidden: torch.Tensor) -> torch.Tensor:
    """[batch, seq] the largest |h| of each token, float32 on the host."""
    return hidden.abs().amax(dim=-1).float().cpu()
