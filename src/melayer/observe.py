"""One batch through the model, and what is kept of each site of each block: sums, counts, maxima with their places.

Everything is reduced on the model's device while the batch runs; one copy a field to the host follows at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from melayer import attention, histogram, hooks
from melayer.architecture import Decoder, Site
from melayer.errors import InputError
from melayer.hooks import Point
from melayer.inputs import Batch
from melayer.locate import Criterion, forward

SiteName = Literal[
    "embedding", "attn_in", "q", "k", "v", "attn_act", "attn_out", "ffn_in", "ffn_act", "ffn_out", "block_out",
    "final_norm",
]  # fmt: skip
SITES: tuple[SiteName, ...] = get_args(SiteName)
"""Every site that can be observed, in the order in which a block computes them."""

_IN_BLOCKS: tuple[Site, ...] = ("attn_in", "attn_act", "attn_out", "ffn_in", "ffn_act", "ffn_out", "block_out")
_IN_HEADS = ("q", "k", "v")
_CACHED = 1 << 17  # values at once for each thread: with what is made of them they fit into a second-level cache


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


@dataclass(eq=False)
class Tokens:
    """Which places of a padded batch are tokens."""

    batch: Batch
    n_tokens: int = field(init=False)
    padded: bool = field(init=False)
    _placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _buffers: dict[tuple[torch.device, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """Looks at the lengths once."""
        self.n_tokens = sum(self.batch.lengths)
        self.padded = self.n_tokens < self.batch.ids.numel()

    def buffers(self, device: torch.device, n: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Two [n, width] in float32 and one in int32 to compute in: memory that is new at each site costs time."""
        key = device, n, width
        if key not in self._buffers:
            first, second = torch.empty(2, n, width, dtype=torch.float32, device=device)
            self._buffers[key] = first, second, torch.empty(n, width, dtype=torch.int32, device=device)
        return self._buffers[key]

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[n_tokens] the flat places of the tokens, the row of each (int32), and [batch] the rows."""
        if device not in self._placed:
            flags = self.batch.attention_mask.bool()
            rows = flags.nonzero()[:, 0].to(torch.int32)
            every = torch.arange(len(self.batch.rows), device=device)
            self._placed[device] = (flags.flatten().nonzero()[:, 0].to(device), rows.to(device), every)
        return self._placed[device]

    def spread(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """[batch, seq] of one value for each token [n_tokens], with `fill` at the padding."""
        if not self.padded:
            return values.view(self.batch.ids.shape)
        whole = values.new_full((self.batch.ids.numel(),), fill)
        return whole.index_copy_(0, self.on(values.device)[0], values).view(self.batch.ids.shape)


def observe(decoder: Decoder, batch: Batch, places: Sequence[Place], criterion: Criterion) -> Observation:
    """What is kept of one batch.

    Args:
        decoder: The model's parts.
        batch: Sequences, padded on the right.
        places: What to look at, from `places_of`.
        criterion: Which scalars of a block's output are massive.
    """
    tokens = Tokens(batch)
    kept: dict[Place, _Reduced] = {}
    massive: dict[int, torch.Tensor] = {}

    def see(place: Place, x: torch.Tensor) -> None:
        found = _reduced(x, tokens, by_row=place.site == "block_out")
        if place.site == "block_out":
            assert place.layer is not None
            massive[place.layer] = _massive(x, found, tokens, criterion)
            found = found._replace(counts=found.counts.sum(0, keepdim=True))
        kept[place] = found

    with ExitStack() as stack:
        if any(place.site in _IN_HEADS for place in places):
            wanted = set(places)

            def see_heads(layer: int, name: str, x: torch.Tensor) -> None:
                if Place(name, layer) in wanted:
                    see(Place(name, layer), x.transpose(1, 2).flatten(2))

            stack.enter_context(attention.watch_heads(decoder, see_heads))
        stack.enter_context(hooks.watch(watched(decoder, places), see))
        forward(decoder.model, batch)

    def on_host(*names: str, how: Callable[..., torch.Tensor] = torch.Tensor.contiguous) -> NDArray[Any]:
        return _on_host([[getattr(kept[place], name) for name in names] for place in places], how)

    dim_maxima = _rows_on_host([kept[place].dim_maxima for place in places])
    return Observation(
        places=tuple(places),
        counts=on_host("counts")[:, 0],
        sums=on_host("powers", "token_maxima", how=_sums),
        n_summed=on_host("token_maxima", how=_n_finite) * np.array([len(found) for found in dim_maxima]),
        maxima=on_host("maxima"),
        tokens=on_host("tokens"),
        dims=on_host("dims"),
        dim_maxima=dim_maxima,
        massive=_on_host([[massive[layer]] for layer in sorted(massive)]).reshape(-1, *batch.ids.shape),
    )


class _Reduced(NamedTuple):
    """One site of one block, on its device."""

    counts: torch.Tensor
    """[rows, BINS], or [1, BINS] of all rows together."""
    powers: torch.Tensor
    """[4, n_tokens] of each token the sums of x, x^2 and x^3, and the root of that of x^4."""
    token_maxima: torch.Tensor
    """[n_tokens]"""
    maxima: torch.Tensor
    tokens: torch.Tensor
    dims: torch.Tensor
    dim_maxima: torch.Tensor


def _reduced(x: torch.Tensor, tokens: Tokens, *, by_row: bool) -> _Reduced:
    """What is kept of x [batch, seq, d].

    Some tokens at a time, so that all passes but the first find them in the processor's cache. Whatever needs no
    other look at x waits for the end of the batch, where all sites are dealt with at once.
    """
    flat, n, width = x.reshape(-1, x.shape[-1]), tokens.n_tokens, x.shape[-1]
    places, rows, every_row = tokens.on(x.device)
    n_rows, device = len(tokens.batch.rows), x.device
    n_pieces = -(-n * width // (torch.get_num_threads() * _CACHED)) if device.type == "cpu" else 1
    step = -(-n // n_pieces)
    token_max = torch.empty(n, dtype=torch.float32, device=device)
    powers = torch.empty(4, n, dtype=torch.float32, device=device)
    dim_max = torch.zeros(-(-n // step), width, dtype=torch.float32, device=device)
    counted: torch.Tensor | None = None
    buffers = tokens.buffers(device, step, width)
    for piece, start in enumerate(range(0, n, step)):
        span = slice(start, min(start + step, n))
        part = (flat.index_select(0, places[span]) if tokens.padded else flat[span]).float()
        magnitude, square, bins = buffers if n - start >= step else (buffer[: n - start] for buffer in buffers)
        torch.abs(part, out=magnitude)
        torch.amax(magnitude, dim=-1, out=token_max[span])
        torch.amax(magnitude, dim=0, out=dim_max[piece])
        found = histogram.counts(magnitude, rows[span], n_rows if by_row else 1, buffer=bins)
        counted = found if counted is None else counted.add_(found)
        # Token by token, so that a sum in float32 has few terms; magnitude is done with and holds the cubes.
        torch.mul(part, part, out=square)
        torch.sum(part, dim=-1, out=powers[0, span])
        torch.sum(square, dim=-1, out=powers[1, span])
        torch.sum(torch.mul(square, part, out=magnitude), dim=-1, out=powers[2, span])
        torch.linalg.vector_norm(square, dim=-1, out=powers[3, span])
    assert counted is not None
    where = tokens.spread(token_max, -1.0).argmax(dim=1)
    largest = x[every_row, where].float()
    dims = largest.abs().argmax(dim=1)
    maxima = largest.gather(1, dims.unsqueeze(1))[:, 0]
    return _Reduced(counted, powers, token_max, maxima, where, dims, dim_max.amax(dim=0))


def _sums(powers: torch.Tensor, token_maxima: torch.Tensor) -> torch.Tensor:
    """[places, 4] over the tokens without a NaN or an infinity, of [places, 4, n_tokens] and [places, n_tokens]."""
    kept = torch.where(torch.isfinite(token_maxima).unsqueeze(1), powers, 0.0)
    kept[:, 3].square_()
    return kept.sum(dim=-1, dtype=torch.float64)


def _n_finite(token_maxima: torch.Tensor) -> torch.Tensor:
    """[places] how many tokens of [places, n_tokens] hold neither a NaN nor an infinity."""
    return torch.isfinite(token_maxima).sum(dim=-1)


def _massive(x: torch.Tensor, found: _Reduced, tokens: Tokens, criterion: Criterion) -> torch.Tensor:
    """[batch, seq] the tokens of x [batch, seq, d_model] that hold a massive scalar.

    The bin that holds a row's median says of nearly every token which it is. Where one stands so near the threshold
    that the bin cannot tell, the median is computed; it costs more than all the rest.
    """
    device, lengths = x.device, tokens.batch.lengths
    ends = histogram.edges_on(device)
    n_values = torch.tensor(lengths, device=device) * x.shape[-1]
    # As torch's median: the lower of the two middle ones.
    bins = torch.searchsorted(found.counts.cumsum(1), ((n_values - 1) // 2 + 1).unsqueeze(1))[:, 0]
    token_max = tokens.spread(found.token_maxima, 0.0)
    finite = torch.isfinite(token_max).all(dim=1, keepdim=True)

    def above(median: torch.Tensor) -> torch.Tensor:
        return torch.clamp(criterion.min_ratio * median, min=criterion.min_abs)

    flags, maybe = ((token_max.double() > above(bound).unsqueeze(1)) & finite for bound in (ends[bins + 1], ends[bins]))
    # To ask another device which rows these are would make it wait, block by block; there all are computed.
    doubtful = (flags != maybe).any(dim=1).nonzero()[:, 0].tolist() if device.type == "cpu" else range(len(lengths))
    for row in doubtful:
        bound = above(_median(x[row, : lengths[row]]))
        flags[row, : lengths[row]] = (token_max[row, : lengths[row]] > bound) & finite[row]
    return flags


def _median(x: torch.Tensor) -> torch.Tensor:
    """[] of |x|, float32."""
    return x.float().abs().flatten().median()


def _rows_on_host(rows: Sequence[torch.Tensor]) -> tuple[NDArray[np.float32], ...]:
    """Rows of any lengths, with one copy for each device that holds some."""
    found: dict[int, NDArray[np.float32]] = {}
    for device in {row.device for row in rows}:
        places = [place for place, row in enumerate(rows) if row.device == device]
        ends = np.cumsum([len(rows[place]) for place in places])
        together = torch.cat([rows[place] for place in places]).cpu().numpy()
        found.update(zip(places, np.split(together, ends[:-1]), strict=True))
    return tuple(found[place] for place in range(len(rows)))


def _on_host(
    fields: Sequence[Sequence[torch.Tensor]], how: Callable[..., torch.Tensor] = torch.Tensor.contiguous
) -> NDArray[Any]:
    """What `how` makes of the fields, those of all places stacked: once for each device that holds some."""
    if not fields:
        return np.zeros(0, dtype=bool)
    by_device: dict[torch.device, list[int]] = {}
    for place, tensors in enumerate(fields):
        by_device.setdefault(tensors[0].device, []).append(place)
    order, parts = [], []
    for places in by_device.values():
        stacked = [torch.stack(column) for column in zip(*(fields[place] for place in places), strict=True)]
        order += places
        parts.append(how(*stacked).cpu().numpy())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)[np.argsort(order)]
