"""How rigid a token's state is: its cosines across blocks, and across inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Row, batches
from melayer.measurements.locate.trajectory import Targets, prefixes_of
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.numerics.host import stacked

# First tokens in one pass, so that their states at every block stay small beside the model.
_MOST_ROWS = 256


def across_blocks(
    decoder: Decoder, targets: Targets, max_batch_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n_layers - 1] cosines between neighbouring blocks and [n_layers] to the peak state, means over sequences.

    Args:
        decoder: The model's parts.
        targets: The token to follow in each sequence.
        max_batch_tokens: Tokens in one forward pass.
    """
    prefixes = prefixes_of(targets)
    rows = [row for row, _ in prefixes]
    ends = {row.index: len(row) - 1 for row in rows}
    to_next = np.zeros(decoder.n_layers - 1)
    to_peak = np.zeros(decoder.n_layers)
    for batch, states in _states(decoder, rows, ends, max_batch_tokens):
        peaks = np.nan_to_num(np.linalg.norm(states, axis=-1)).argmax(axis=0)
        units = _unit(states)
        for place, row in enumerate(batch):
            unit, weight = units[:, place], len(prefixes[row.index][1])
            to_next += weight * (unit[:-1] * unit[1:]).sum(axis=-1)
            to_peak += weight * (unit @ unit[peaks[place]])
    count = max(1, len(targets))
    return np.clip(to_next / count, -1, 1), np.clip(to_peak / count, -1, 1)


def across_inputs(
    decoder: Decoder, rows: Sequence[Row], me_layer: int | None, min_abs: float, max_batch_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], int | None]:
    """[n_layers] mean pairwise cosines of the first token's state, the same for those massive, and how many are.

    Args:
        decoder: The model's parts.
        rows: Each with another first token.
        me_layer: Where to ask which of them are massive; None does not ask, and says None of how many.
        min_abs: What |h| must exceed there. A token alone is its own median, so there is no ratio to it.
        max_batch_tokens: Tokens in one forward pass.
    """
    sums = np.zeros((2, decoder.n_layers, decoder.d_model))
    n_massive = 0
    limit = min(max_batch_tokens, _MOST_ROWS * max(map(len, rows)))
    for _, states in _states(decoder, rows, {row.index: 0 for row in rows}, limit):
        units = _unit(states)
        sums[0] += units.sum(axis=1)
        if me_layer is not None:
            massive = np.abs(states[me_layer]).max(axis=-1) > min_abs
            sums[1] += units[:, massive].sum(axis=1)
            n_massive += int(massive.sum())
    among = mean_pairwise_cosine(sums[1], n_massive)
    return mean_pairwise_cosine(sums[0], len(rows)), among, None if me_layer is None else n_massive


def mean_pairwise_cosine(unit_sum: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """The mean cosine over all pairs of n unit vectors from their sum [..., d] alone; NaN for fewer than two.

    ||sum||^2 is n ones and every pair twice, so no pair is ever formed.
    """
    if n < 2:
        return np.full(unit_sum.shape[:-1], np.nan)
    cosine: NDArray[np.float64] = np.clip((np.square(unit_sum).sum(axis=-1) - n) / (n * (n - 1)), -1, 1)
    return cosine


def _states(
    decoder: Decoder, rows: Sequence[Row], places: Mapping[int, int], max_batch_tokens: int
) -> Iterator[tuple[tuple[Row, ...], NDArray[np.float64]]]:
    """For each batch its rows, and [n_layers, batch, d_model] the state of one token of each at every block's output.

    Args:
        decoder: The model's parts.
        rows: The sequences to run.
        places: For each row's index, which token.
        max_batch_tokens: Tokens in one forward pass.
    """
    points = [(block.layer, block.sites["block_out"]) for block in decoder.blocks]
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        by_layer: dict[int, torch.Tensor] = {}
        at = torch.tensor([places[row.index] for row in batch.rows])

        def see(layer: int, hidden: torch.Tensor, at: torch.Tensor = at, into: Any = by_layer) -> None:
            into[layer] = hidden[torch.arange(len(at), device=hidden.device), at.to(hidden.device)].float()

        with hooks.watch(points, see):
            forward(decoder.model, batch)
        yield batch.rows, stacked([by_layer[layer] for layer, _ in points])


def _unit(states: NDArray[np.float64]) -> NDArray[np.float64]:
    """The states with norm 1; NaN where one has no direction."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(states / np.linalg.norm(states, axis=-1, keepdims=True))
