"""How diverse tokens are: the effective rank of what a sequence holds at a site, with and without massive tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Batch, Row, batches
from melayer.measurements.rigidity.result import EffectiveRank
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.numerics.finite import finite_all
from melayer.numerics.host import stacked

MIN_RANK_TOKENS = 8
"""A shorter sequence says nothing about rank: it cannot exceed the number of tokens."""
RankSite = Literal["attn_in", "block_out"]
_SITES: tuple[RankSite, ...] = ("attn_in", "block_out")


def spectral_entropy(tokens: torch.Tensor) -> torch.Tensor:
    """The entropy in nats, a scalar on the device, of sigma_i^2 / sum sigma^2 of a matrix [tokens, d_model].

    Uncentred. NaN where an entry is not finite or all are zero.
    """
    # float64: a massive token's eigenvalue is 1e6 times the others', and float32 would drown them. MPS has none.
    wide = (tokens.cpu() if tokens.device.type == "mps" else tokens).double()
    finite = torch.isfinite(wide).all()
    wide = torch.where(finite, wide, torch.zeros_like(wide))
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    entropy: torch.Tensor = torch.special.entr(eigenvalues / eigenvalues.sum()).sum()  # 0 / 0 is the NaN promised
    return entropy


def effective_ranks(
    decoder: Decoder,
    rows: Sequence[Row],
    massive: Mapping[int, set[int]],
    max_batch_tokens: int,
    report: Callable[[int], None],
) -> tuple[EffectiveRank, ...]:
    """The effective ranks at every block's `attn_in` and `block_out`, means over the rows.

    Args:
        decoder: The model's parts.
        rows: The sequences to run.
        massive: The massive tokens of each, by the row's index; empty where none is massive in any.
        max_batch_tokens: Tokens in one forward pass.
        report: Called with the tokens done.
    """
    points = [
        ((block.layer, site), block.sites[site]) for block in decoder.blocks for site in _SITES if site in block.sites
    ]
    by_batch: list[NDArray[np.float64]] = []
    done = 0
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        entropies: dict[tuple[int, RankSite], torch.Tensor] = {}

        def see(key: tuple[int, RankSite], hidden: torch.Tensor, batch: Batch = batch, into: Any = entropies) -> None:
            into[key] = _entropies(hidden, batch, massive)

        with hooks.watch(points, see):
            forward(decoder.model, batch)
        by_batch.append(stacked([entropies[key] for key, _ in points]))
        done += sum(batch.lengths)
        report(done)
    if not by_batch:
        return ()
    entropy = np.concatenate(by_batch, axis=1)  # [points, rows, with and without]
    mean, rank = entropy.mean(axis=1), np.exp(entropy).mean(axis=1)
    if not massive:
        mean[:, 1] = rank[:, 1] = np.nan
    return tuple(
        EffectiveRank(layer, site, *finite_all(rank[place]), *finite_all(mean[place]))
        for place, ((layer, site), _) in enumerate(points)
    )


def _entropies(hidden: torch.Tensor, batch: Batch, massive: Mapping[int, set[int]]) -> torch.Tensor:
    """[batch, 2] the spectral entropy of each row of `hidden` [batch, seq, d_model], with and without its massive
    tokens; nothing is asked of the device.
    """
    pairs = []
    for place, row in enumerate(batch.rows):
        tokens = hidden[place, : len(row)]
        ordinary = [at for at in range(len(row)) if at not in massive.get(row.index, ())]
        whole = spectral_entropy(tokens)
        pairs.append(torch.stack([whole, spectral_entropy(tokens[ordinary]) if len(ordinary) < len(row) else whole]))
    return torch.stack(pairs)
