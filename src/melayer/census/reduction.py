"""The passes over one site's activations, and what is kept of them on their device until the batch is done."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from melayer.data.rows import Batch
from melayer.measurements.criterion import Criterion
from melayer.numerics import histogram

_CACHED = 1 << 17  # values at once for each thread: with what is made of them they fit into a second-level cache


@dataclass(eq=False)
class Reduction:
    """What is kept of `K` places of a batch that are computed on one device.

    All of it is written into memory that is taken before the first block runs. Were it allocated place by place,
    between the activations, each piece would keep the freed memory around it from being joined and used again: over
    all sites of the demo model that was as much as the model itself.
    """

    batch: Batch
    """Padded on the right."""
    device: torch.device
    K: int
    seen: list[int] = field(default_factory=list)
    """The places that were."""
    counts: torch.Tensor = field(init=False)
    """[K, BINS] histogram of |x|."""
    powers: torch.Tensor = field(init=False)
    """[K, 4, n_tokens] of each token the sums of x, x^2 and x^3, and the root of that of x^4."""
    token_maxima: torch.Tensor = field(init=False)
    """[K, n_tokens] the largest |x|."""
    maxima: torch.Tensor = field(init=False)
    """[K, batch] the largest |x| of each row, signed."""
    where: torch.Tensor = field(init=False)
    """[K, batch] its token."""
    dims: torch.Tensor = field(init=False)
    """[K, batch] its dimension."""
    massive: torch.Tensor = field(init=False)
    """[K, batch, seq] which tokens hold a massive scalar, where that was asked for."""
    _dim_maxima: dict[int, torch.Tensor] = field(default_factory=dict)
    _widths: dict[int, int] = field(default_factory=dict)
    _buffers: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Takes the memory."""
        ids, n = self.batch.ids, sum(self.batch.lengths)
        self._padded = n < ids.numel()
        flags = self.batch.attention_mask.bool()
        self._places = flags.flatten().nonzero()[:, 0].to(self.device)  # [n_tokens] of the tokens in the batch
        self._rows = flags.nonzero()[:, 0].to(self.device, torch.int32)  # [n_tokens] the row of each
        self._every_row = torch.arange(len(ids), device=self.device)
        self.counts = torch.empty(self.K, histogram.BINS, dtype=torch.int64, device=self.device)
        self.powers = torch.empty(self.K, 4, n, dtype=torch.float32, device=self.device)
        self.token_maxima = torch.empty(self.K, n, dtype=torch.float32, device=self.device)
        self.maxima = torch.empty(self.K, len(ids), dtype=torch.float32, device=self.device)
        self.where, self.dims = torch.empty(2, self.K, len(ids), dtype=torch.int64, device=self.device)
        self.massive = torch.zeros(self.K, *ids.shape, dtype=torch.bool, device=self.device)

    def add(self, place: int, x: torch.Tensor, criterion: Criterion | None = None) -> None:
        """Keeps what is kept of x [batch, seq, d]; with a criterion, also which tokens are massive.

        Some tokens at a time, so that all passes but the first find them in the processor's cache. Whatever needs no
        other look at x waits for the end of the batch, where all places are dealt with at once.
        """
        self.seen.append(place)
        flat, n, width = x.reshape(-1, x.shape[-1]), len(self._rows), x.shape[-1]
        n_pieces = -(-n * width // (torch.get_num_threads() * _CACHED)) if self.device.type == "cpu" else 1
        step = -(-n // n_pieces)
        token_maxima, powers = self.token_maxima[place], self.powers[place]
        dim_maxima = self._dim_maxima_of(place, width)
        buffers = self._buffers_of(step, width)
        n_groups = len(self._every_row) if criterion is not None else 1
        counted: torch.Tensor | None = None
        for start in range(0, n, step):
            span = slice(start, min(start + step, n))
            part = (flat.index_select(0, self._places[span]) if self._padded else flat[span]).float()
            magnitude, square, wide, bins = buffers if n - start >= step else [of[: n - start] for of in buffers]
            torch.abs(part, out=magnitude)
            torch.amax(magnitude, dim=-1, out=token_maxima[span])
            torch.maximum(dim_maxima, magnitude.amax(dim=0), out=dim_maxima)
            found = histogram.counts(magnitude, self._rows[span], n_groups, buffers=(wide, bins))
            counted = found if counted is None else counted.add_(found)
            # Token by token, so that a sum in float32 has few terms; magnitude is done with and holds the cubes.
            torch.mul(part, part, out=square)
            torch.sum(part, dim=-1, out=powers[0, span])
            torch.sum(square, dim=-1, out=powers[1, span])
            torch.sum(torch.mul(square, part, out=magnitude), dim=-1, out=powers[2, span])
            torch.linalg.vector_norm(square, dim=-1, out=powers[3, span])
        assert counted is not None
        where = torch.argmax(self._spread(token_maxima, -1.0), dim=1, out=self.where[place])
        largest = x[self._every_row, where].float()
        dims = torch.argmax(largest.abs(), dim=1, out=self.dims[place])
        self.maxima[place] = largest.gather(1, dims.unsqueeze(1))[:, 0]
        torch.sum(counted, dim=0, out=self.counts[place])
        if criterion is not None:
            self.massive[place] = self._massive(x, counted, token_maxima, criterion)

    def sums(self) -> torch.Tensor:
        """[K, 4] sums of x, x^2, x^3 and x^4 over the tokens without a NaN or an infinity; float64."""
        kept = torch.where(torch.isfinite(self.token_maxima).unsqueeze(1), self.powers, 0.0)
        kept[:, 3].square_()
        return kept.sum(dim=-1, dtype=torch.float64)

    def n_finite(self) -> torch.Tensor:
        """[K] how many tokens these are over."""
        return torch.isfinite(self.token_maxima).sum(dim=-1)

    def dim_maxima(self) -> tuple[list[int], torch.Tensor]:
        """The places seen, by width, and the largest |x| of each dimension of each, one after the other."""
        order = sorted(self.seen, key=lambda place: self._widths[place])
        together = [
            self._dim_maxima[width][[place for place in order if self._widths[place] == width]].flatten()
            for width in sorted(self._dim_maxima)
        ]
        return order, torch.cat(together)

    def width(self, place: int) -> int:
        """The dimensions of a place that was seen."""
        return self._widths[place]

    def _dim_maxima_of(self, place: int, width: int) -> torch.Tensor:
        self._widths[place] = width
        if width not in self._dim_maxima:
            self._dim_maxima[width] = torch.zeros(self.K, width, dtype=torch.float32, device=self.device)
        return self._dim_maxima[width][place]

    def _buffers_of(self, n: int, width: int) -> list[torch.Tensor]:
        """Four [n, width] to compute in: two in float32, one in int32 and one in int16."""
        if (n, width) not in self._buffers:
            kinds = (torch.float32, torch.float32, torch.int32, torch.int16)
            self._buffers[n, width] = [torch.empty(n, width, dtype=of, device=self.device) for of in kinds]
        return self._buffers[n, width]

    def _spread(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """[batch, seq] of one value for each token [n_tokens], with `fill` at the padding."""
        shape = self.batch.ids.shape
        if not self._padded:
            return values.view(shape)
        return values.new_full((shape.numel(),), fill).index_copy_(0, self._places, values).view(shape)

    def _massive(
        self, x: torch.Tensor, counted: torch.Tensor, token_maxima: torch.Tensor, criterion: Criterion
    ) -> torch.Tensor:
        """[batch, seq] the tokens of x [batch, seq, d_model] that hold a massive scalar; counted: [batch, BINS].

        The bin that holds a row's median says of nearly every token which it is. Where one stands so near the threshold
        that the bin cannot tell, the median is computed; it costs more than all the rest.
        """
        lengths = self.batch.lengths
        ends = histogram.edges_on(self.device)
        n_values = torch.tensor(lengths, device=self.device) * x.shape[-1]
        # As torch's median: the lower of the two middle ones.
        bins = torch.searchsorted(counted.cumsum(1), ((n_values - 1) // 2 + 1).unsqueeze(1))[:, 0]
        token_max = self._spread(token_maxima, 0.0)
        finite = torch.isfinite(token_max).all(dim=1, keepdim=True)

        def above(median: torch.Tensor) -> torch.Tensor:
            return torch.clamp(criterion.min_ratio * median, min=criterion.min_abs)

        flags, maybe = (
            (token_max.double() > above(bound).unsqueeze(1)) & finite for bound in (ends[bins + 1], ends[bins])
        )
        # To ask another device which rows these are would make it wait, block by block; there all are computed.
        on_host = self.device.type == "cpu"
        doubtful = (flags != maybe).any(dim=1).nonzero()[:, 0].tolist() if on_host else range(len(lengths))
        for row in doubtful:
            bound = above(_median(x[row, : lengths[row]]))
            flags[row, : lengths[row]] = (token_max[row, : lengths[row]] > bound) & finite[row]
        return flags


def _median(x: torch.Tensor) -> torch.Tensor:
    """[] of |x|, float32."""
    return x.float().abs().flatten().median()
