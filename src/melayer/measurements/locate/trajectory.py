"""The trajectory of a massive token: its state after every block, and what each block adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.data.rows import Row, batches
from melayer.model import hooks
from melayer.model.decoder import Decoder, Site
from melayer.model.forward import Run, forward
from melayer.model.hooks import Point

if TYPE_CHECKING:
    pass


# --- the second pass: the massive tokens alone -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Course:
    """One token's way through the blocks; NaN where a block does not have the site."""

    block_in: NDArray[np.float32]
    """[n_layers, d_model]"""
    attn_out: NDArray[np.float32]
    ffn_out: NDArray[np.float32]
    block_out: NDArray[np.float32]


FOLLOWED: tuple[Site, ...] = ("block_in", "attn_out", "ffn_out", "block_out")


def followed_points(decoder: Decoder) -> list[tuple[tuple[int, Site], Point]]:
    """Where a token's course can be seen, each with its block and site."""
    return [
        ((block.layer, site), block.sites[site]) for block in decoder.blocks for site in FOLLOWED if site in block.sites
    ]


def courses(
    decoder: Decoder, targets: Mapping[int, tuple[Row, int]], *, max_batch_tokens: int, run: Run | None = None
) -> Iterable[tuple[list[int], Course]]:
    """For each distinct prefix that ends in a target token: the sequences that have it, and its course.

    Args:
        decoder: The model's parts.
        targets: The token to follow in each row, by the row's index.
        max_batch_tokens: Tokens in one forward pass.
        run: Runs a batch, in place of `forward`.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for sequence, (row, token) in targets.items():
        sharing.setdefault(row.ids[: token + 1], []).append(sequence)
    prefixes = [
        Row(index=place, text="", ids=ids, tokens=(), n_dropped=0, has_bos=False) for place, ids in enumerate(sharing)
    ]
    for batch in batches(prefixes, max_batch_tokens=max_batch_tokens):
        seen: dict[tuple[int, Site], torch.Tensor] = {}
        ends = torch.tensor(batch.lengths) - 1

        def see(key: tuple[int, Site], hidden: torch.Tensor, ends: torch.Tensor = ends, into: Any = seen) -> None:
            places = torch.arange(len(ends), device=hidden.device)
            into[key] = hidden[places, ends.to(hidden.device)].float()

        with hooks.watch(followed_points(decoder), see):
            (run or forward)(decoder.model, batch)
        states = {key: state.cpu().numpy() for key, state in seen.items()}
        for place, prefix in enumerate(batch.rows):
            yield sharing[prefix.ids], course_of({key: state[place] for key, state in states.items()})


def course_of(states: Mapping[tuple[int, Site], NDArray[np.float32]]) -> Course:
    """The course of one token.

    Args:
        states: [d_model] its state at each block and site, as far as the run went.
    """
    n_layers = 1 + max(layer for layer, _ in states)
    absent = np.full_like(states[0, "block_in"], np.nan)
    return Course(
        **{site: np.stack([states.get((layer, site), absent) for layer in range(n_layers)]) for site in FOLLOWED}
    )


Follow = Callable[[Mapping[int, tuple[Row, int]]], Iterable[tuple[list[int], Course]]]
"""From the token to follow in each sequence to courses, each with the sequences that have it."""


def shares_of(course: Course) -> tuple[int, float, NDArray[np.float64]]:
    """The peak layer, the embedding's share, and [n_layers, 3] the shares of each block, its attention, its FFN.

    The share of a block is <block_out - block_in, u> / <peak state, u>, u the unit vector of the state where its
    norm peaks. Up to the peak they add up to 1 with the embedding's.
    """
    states = course.block_out.astype(np.float64)
    peak = int(np.linalg.norm(states, axis=1).argmax())
    direction = states[peak] / np.linalg.norm(states[peak])
    whole = states[peak] @ direction
    writes = [states - course.block_in, course.attn_out, course.ffn_out]
    return (
        peak,
        float(course.block_in[0] @ direction / whole),
        np.stack([np.asarray(write, dtype=np.float64) @ direction / whole for write in writes], axis=1),
    )
