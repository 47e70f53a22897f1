"""The trajectory of a massive token: its state after every block, and what each block adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Row, batches
from melayer.model import hooks
from melayer.model.decoder import Decoder, Site
from melayer.model.forward import Run, forward
from melayer.model.hooks import Point

Targets = Mapping[int, tuple[Row, int]]
"""The token to follow in each sequence, by the sequence's index: its row, and the token's place there."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One token's way through the blocks that were run; NaN where a block does not have the site."""

    block_in: NDArray[np.float32]
    """[blocks run, d_model], as are the others."""
    attn_out: NDArray[np.float32]
    ffn_out: NDArray[np.float32]
    block_out: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Growth:
    """Who wrote the peak state of a trajectory: the embedding, and each block.

    The share of a block is <block_out - block_in, u> / <peak state, u>, u the unit vector of the state where its
    norm peaks. Up to the peak they add up to 1 with the embedding's.
    """

    peak_layer: int
    embedding_share: float
    shares: NDArray[np.float64]
    """[blocks run, 3] of each block, of its attention, and of its FFN; NaN where it does not have the site."""


Follow = Callable[[Targets], Iterable[tuple[list[int], Trajectory]]]
"""From the tokens to follow to trajectories, each with the sequences that have it."""

_FOLLOWED: tuple[Site, ...] = ("block_in", "attn_out", "ffn_out", "block_out")


def followed_points(decoder: Decoder) -> list[tuple[tuple[int, Site], Point]]:
    """Where a token's trajectory can be seen, each with its block and site."""
    return [
        ((block.layer, site), block.sites[site])
        for block in decoder.blocks
        for site in _FOLLOWED
        if site in block.sites
    ]


def prefixes_of(targets: Targets) -> list[tuple[Row, list[int]]]:
    """The distinct beginnings that end in a target token, as rows of their own, each with the sequences that have it.

    A token sees only what is before it: cut behind it, and equal beginnings run once.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for sequence, (row, token) in targets.items():
        sharing.setdefault(row.ids[: token + 1], []).append(sequence)
    return [(bare_row(place, ids), sequences) for place, (ids, sequences) in enumerate(sharing.items())]


def bare_row(index: int, ids: tuple[int, ...]) -> Row:
    """A row that is run for its ids alone."""
    return Row(index=index, text="", ids=ids, tokens=(), n_dropped=0, has_bos=False)


def trajectories(
    decoder: Decoder, targets: Targets, *, max_batch_tokens: int, run_batch: Run = forward
) -> Iterable[tuple[list[int], Trajectory]]:
    """For each distinct prefix that ends in a target token: the sequences that have it, and its trajectory.

    Args:
        decoder: The model's parts.
        targets: The token to follow in each row.
        max_batch_tokens: Tokens in one forward pass.
        run_batch: Runs a batch.
    """
    prefixes = prefixes_of(targets)
    for batch in batches([row for row, _ in prefixes], max_batch_tokens=max_batch_tokens):
        last_states: dict[tuple[int, Site], torch.Tensor] = {}
        ends = torch.tensor(batch.lengths) - 1

        def see(
            key: tuple[int, Site], hidden: torch.Tensor, ends: torch.Tensor = ends, into: Any = last_states
        ) -> None:
            places = torch.arange(len(ends), device=hidden.device)
            into[key] = hidden[places, ends.to(hidden.device)].float()

        with hooks.watch(followed_points(decoder), see):
            run_batch(decoder.model, batch)
        states = {key: state.cpu().numpy() for key, state in last_states.items()}
        for place, prefix in enumerate(batch.rows):
            yield prefixes[prefix.index][1], trajectory_of({key: state[place] for key, state in states.items()})


def trajectory_of(states: Mapping[tuple[int, Site], NDArray[np.float32]]) -> Trajectory:
    """The trajectory of one token.

    Args:
        states: [d_model] its state at each block and site, as far as the run went.
    """
    n_run = 1 + max(layer for layer, _ in states)
    absent = np.full_like(states[0, "block_in"], np.nan)
    return Trajectory(
        **{site: np.stack([states.get((layer, site), absent) for layer in range(n_run)]) for site in _FOLLOWED}
    )


def growth_of(trajectory: Trajectory) -> Growth:
    """Who wrote the state where the norm of a trajectory peaks."""
    states = trajectory.block_out.astype(np.float64)
    peak = int(np.linalg.norm(states, axis=1).argmax())
    direction = states[peak] / np.linalg.norm(states[peak])
    whole = states[peak] @ direction
    writes = [states - trajectory.block_in, trajectory.attn_out, trajectory.ffn_out]
    return Growth(
        peak_layer=peak,
        embedding_share=float(trajectory.block_in[0] @ direction / whole),
        shares=np.stack([np.asarray(write, dtype=np.float64) @ direction / whole for write in writes], axis=1),
    )
