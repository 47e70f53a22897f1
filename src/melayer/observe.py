"""One batch through the model, and what is kept of each site of each block: sums, counts, maxima with their places.

Everything is reduced on the model's device while the batch runs; one copy a field to the host follows at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
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
_CACHED = 1 << 16  # values at once for each thread: with what is made of them they fit into a second-level cache


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
    _placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Looks at the lengths once."""
        self.n_tokens = sum(self.batch.lengths)
        self.padded = self.n_tokens < self.batch.ids.numel()

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[n_tokens] the flat places of the tokens, and the row of each (int32)."""
        if device not in self._placed:
            flags = self.batch.attention_mask.bool()
            rows = flags.nonzero()[:, 0].to(torch.int32)
            self._placed[device] = (flags.flatten().nonzero()[:, 0].to(device), rows.to(device))
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

    def on_host(name: str) -> NDArray[Any]:
        return _on_host([getattr(kept[place], name) for place in places])

    dim_maxima = tuple(kept[place].dim_maxima.cpu().numpy() for place in places)
    return Observation(
        places=tuple(places),
        counts=on_host("counts")[:, 0],
        sums=on_host("sums"),
        n_summed=on_host("n_finite") * np.array([len(found) for found in dim_maxima]),
        maxima=on_host("maxima"),
        tokens=on_host("tokens"),
        dims=on_host("dims"),
        dim_maxima=dim_maxima,
        massive=_on_host([massive[layer] for layer in sorted(massive)]).reshape(-1, *batch.ids.shape),
    )


class _Reduced(NamedTuple):
    """One site of one block, on its device."""

    counts: torch.Tensor
    """[rows, BINS], or [1, BINS] of all rows together."""
    sums: torch.Tensor
    maxima: torch.Tensor
    tokens: torch.Tensor
    dims: torch.Tensor
    n_finite: torch.Tensor
    """[] tokens without a NaN or an infinity."""
    dim_maxima: torch.Tensor
    token_maxima: torch.Tensor
    """[n_tokens]"""


def _reduced(x: torch.Tensor, tokens: Tokens, *, by_row: bool) -> _Reduced:
    """What is kept of x [batch, seq, d].

    Some tokens at a time, so that all passes but the first find them in the processor's cache.
    """
    flat = x.reshape(-1, x.shape[-1])
    places, rows = tokens.on(x.device)
    n_rows, device = len(tokens.batch.rows), x.device
    step = max(1, torch.get_num_threads() * _CACHED // x.shape[-1]) if device.type == "cpu" else tokens.n_tokens
    n_groups = n_rows if by_row else 1
    counted = torch.zeros(n_groups, histogram.BINS, dtype=torch.int64, device=device)
    token_max = torch.empty(tokens.n_tokens, dtype=torch.float32, device=device)
    powers = torch.empty(4, tokens.n_tokens, dtype=torch.float32, device=device)
    dim_max = torch.zeros(x.shape[-1], dtype=torch.float32, device=device)
    magnitudes = torch.empty(min(step, tokens.n_tokens), x.shape[-1], dtype=torch.float32, device=device)
    squares, codes = torch.empty_like(magnitudes), torch.empty_like(magnitudes, dtype=torch.int32)
    for start in range(0, tokens.n_tokens, step):
        span = slice(start, min(start + step, tokens.n_tokens))
        part = (flat.index_select(0, places[span]) if tokens.padded else flat[span]).float()
        magnitude, square, code = (buffer[: len(part)] for buffer in (magnitudes, squares, codes))
        torch.abs(part, out=magnitude)
        torch.amax(magnitude, dim=-1, out=token_max[span])
        torch.maximum(dim_max, magnitude.amax(dim=0), out=dim_max)
        counted += histogram.counts(magnitude, rows[span], n_groups, buffer=code)
        # Token by token, so that a sum in float32 has few terms; magnitude is done with and holds the cubes.
        torch.mul(part, part, out=square)
        torch.sum(part, dim=-1, out=powers[0, span])
        torch.sum(square, dim=-1, out=powers[1, span])
        torch.sum(torch.mul(square, part, out=magnitude), dim=-1, out=powers[2, span])
        torch.sum(square.square_(), dim=-1, out=powers[3, span])
    finite = torch.isfinite(token_max)
    sums = torch.where(finite, powers, 0.0).double().sum(1)
    where = tokens.spread(token_max, -1.0).argmax(dim=1)
    largest = x[torch.arange(n_rows, device=device), where].float()
    dims = largest.abs().argmax(dim=1)
    maxima = largest.gather(1, dims.unsqueeze(1))[:, 0]
    return _Reduced(counted, sums, maxima, where, dims, finite.sum(), dim_max, token_max)


def _massive(x: torch.Tensor, found: _Reduced, tokens: Tokens, criterion: Criterion) -> torch.Tensor:
    """[batch, seq] the tokens of x [batch, seq, d_model] that hold a massive scalar.

    The bin that holds a row's median says of nearly every token which it is. Where one stands so near the threshold
    that the bin cannot tell, the median is computed; it costs more than all the rest.
    """
    device, lengths = x.device, tokens.batch.lengths
    ends = torch.from_numpy(histogram.edges()).to(device)
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


def _on_host(tensors: Sequence[torch.Tensor]) -> NDArray[Any]:
    """The tensors as one array, with one copy for each device that holds some."""
    if not tensors:
        return np.zeros(0, dtype=bool)
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    if len(by_device) == 1:
        return torch.stack(list(tensors)).cpu().numpy()
    rows: dict[int, NDArray[Any]] = {}
    for places in by_device.values():
        rows.update(zip(places, torch.stack([tensors[place] for place in places]).cpu().numpy(), strict=True))
    return np.stack([rows[place] for place in range(len(tensors))])
