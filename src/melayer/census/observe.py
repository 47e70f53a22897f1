"""One batch through the model, and what is kept of each site of each block: sums, counts, maxima with their places.

Everything is reduced on the model's device while the batch runs; one copy a field to the host follows at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.census.reduction import Reduction
from melayer.data.rows import Batch
from melayer.errors import ArchitectureError, InputError
from melayer.measurements.criterion import Criterion
from melayer.model import attention, hooks
from melayer.model.decoder import Decoder, Site
from melayer.model.forward import forward
from melayer.model.hooks import Point

SiteName = Literal[
    "embedding", "attn_in", "q", "k", "v", "attn_act", "attn_out", "ffn_in", "ffn_act", "ffn_out", "block_out",
    "final_norm",
]  # fmt: skip
SITES: tuple[SiteName, ...] = get_args(SiteName)
"""Every site that can be observed, in the order in which a block computes them."""

_IN_BLOCKS: tuple[Site, ...] = ("attn_in", "attn_act", "attn_out", "ffn_in", "ffn_act", "ffn_out", "block_out")
_IN_HEADS = ("q", "k", "v")


class Place(NamedTuple):
    """A site of a block; the embedding's output and the final norm's have no block."""

    site: str
    layer: int | None


@dataclass(frozen=True, eq=False)
class Observation:
    """What is kept of a batch of `n` sequences at `K` places, on the host."""

    places: tuple[Place, ...]
    counts: NDArray[np.int64]
    """[K, BINS] histogram of |x|."""
    sums: NDArray[np.float64]
    """[K, 4] sums of x, x^2, x^3 and x^4, over the tokens without a NaN or an infinity."""
    n_summed: NDArray[np.int64]
    """[K] how many values these are over."""
    maxima: NDArray[np.float32]
    """[K, n] the largest |x| of each sequence, signed; NaN where there is one."""
    tokens: NDArray[np.int64]
    """[K, n] its token."""
    dims: NDArray[np.int64]
    """[K, n] its dimension."""
    dim_maxima: tuple[NDArray[np.float32], ...]
    """For each place [d] the largest |x| of each dimension."""
    massive: NDArray[np.bool_]
    """[n_layers, n, seq] which tokens hold a massive scalar at each block's output; empty if that is not observed."""


def places_of(decoder: Decoder, sites: Sequence[str]) -> tuple[Place, ...]:
    """The places of these sites that the model has, in the order in which it computes them.

    Raises:
        InputError: It has none of them.
    """
    found = [Place("embedding", None)] if "embedding" in sites else []
    for block in decoder.blocks:
        has = {*block.sites, *(_IN_HEADS if block.attention is not None else ())}
        found += [Place(site, block.layer) for site in SITES if site in sites and site in has]
    if "final_norm" in sites and decoder.final_norm is not None:
        found.append(Place("final_norm", None))
    if not found:
        raise InputError(f"This model ({decoder.family}) has none of the sites {', '.join(sites)}. Ask for others.")
    return tuple(found)


def watched(decoder: Decoder, places: Sequence[Place]) -> list[tuple[Place, Point]]:
    """Where each of these places is seen, the heads' queries, keys and values left out."""
    points = []
    for place in places:
        if place.site == "embedding":
            points.append((place, decoder.embedding_output))
        elif place.site == "final_norm":
            assert decoder.final_norm is not None
            points.append((place, Point(decoder.final_norm.module, "output")))
        elif place.site not in _IN_HEADS:
            assert place.layer is not None
            points.append((place, decoder.blocks[place.layer].sites[place.site]))  # type: ignore[index]
    return points


def observe(decoder: Decoder, batch: Batch, places: Sequence[Place], criterion: Criterion) -> Observation:
    """What is kept of one batch.

    Args:
        decoder: The model's parts.
        batch: Sequences, padded on the right.
        places: What to look at, from `places_of`.
        criterion: Which scalars of a block's output are massive.

    Raises:
        ArchitectureError: One of the places was not computed.
    """
    kept: dict[torch.device, Reduction] = {}
    number = {place: at for at, place in enumerate(places)}

    def see(place: Place, x: torch.Tensor) -> None:
        if x.device not in kept:
            kept[x.device] = Reduction(batch, x.device, len(places))
        kept[x.device].add(number[place], x, criterion if place.site == "block_out" else None)

    with ExitStack() as stack:
        if any(place.site in _IN_HEADS for place in places):

            def see_heads(layer: int, name: str, x: torch.Tensor) -> None:
                if Place(name, layer) in number:
                    see(Place(name, layer), x.transpose(1, 2).flatten(2))

            stack.enter_context(attention.watch_heads(decoder, see_heads))
        stack.enter_context(hooks.watch(watched(decoder, places), see))
        forward(decoder.model, batch)

    unseen = set(number.values()).difference(*(found.seen for found in kept.values()))
    if unseen:
        place = places[min(unseen)]
        raise ArchitectureError(
            f"{place.site} of block {place.layer} was not computed in this forward pass, so nothing can be said of it. "
            "Leave the site out (--sites)."
        )
    dim_maxima = _dim_maxima(kept.values(), len(places))
    outputs = [at for at, place in enumerate(places) if place.site == "block_out"]
    return Observation(
        places=tuple(places),
        counts=_on_host(kept.values(), lambda found: found.counts),
        sums=_on_host(kept.values(), Reduction.sums),
        n_summed=_on_host(kept.values(), Reduction.n_finite) * np.array([len(found) for found in dim_maxima]),
        maxima=_on_host(kept.values(), lambda found: found.maxima),
        tokens=_on_host(kept.values(), lambda found: found.where),
        dims=_on_host(kept.values(), lambda found: found.dims),
        dim_maxima=dim_maxima,
        massive=_on_host(kept.values(), lambda found: found.massive)[outputs],
    )


def _on_host(kept: Collection[Reduction], what: Callable[[Reduction], torch.Tensor]) -> NDArray[Any]:
    """A field of all places [K, ...], with one copy for each device."""
    fields = [(found.seen, what(found).cpu().numpy()) for found in kept]
    if len(fields) == 1:
        return fields[0][1]
    whole = np.empty_like(fields[0][1])
    for seen, values in fields:
        whole[seen] = values[seen]
    return whole


def _dim_maxima(kept: Collection[Reduction], K: int) -> tuple[NDArray[np.float32], ...]:
    """For each place [d], with one copy for each device."""
    rows: dict[int, NDArray[np.float32]] = {}
    for found in kept:
        order, together = found.dim_maxima()
        ends = np.cumsum([found.width(place) for place in order])
        rows.update(zip(order, np.split(together.cpu().numpy(), ends[:-1]), strict=True))
    return tuple(rows[place] for place in range(K))
