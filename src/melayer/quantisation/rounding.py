"""Forward passes in which every linear map of the blocks reads rounded activations, and how far off these are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from melayer.data.rows import Batch
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.numerics.grids import Format, quantised, scales
from melayer.quantisation.linear_inputs import LinearInput, readers


@dataclass(eq=False)
class Rounding:
    """Every linear input of the forward passes inside its context on a grid, and how far off that is."""

    decoder: Decoder
    inputs: Sequence[LinearInput]
    format: Format
    scales: Sequence[torch.Tensor] | None
    """[] or [d] for each linear input; None: each token's own."""
    excluded: torch.Tensor
    """[n_sequences, T] the tokens whose errors are counted by themselves: the prefix and the massive ones."""
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    """For each input [4]: squared errors and squares of the ordinary tokens, then of those excluded; float64, host."""

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """The forward pass of a batch runs inside; its tokens may be the last of each sequence only."""
        width = batch.ids.shape[1]
        excluded = self.excluded[[row.index for row in batch.rows], -width:].flatten()
        batch_sums: dict[int, torch.Tensor] = {}
        last: list[torch.Tensor] = []

        def change(place: int, x: torch.Tensor) -> torch.Tensor | None:
            if x.shape[:-1].numel() != len(excluded):
                return None  # the single token with which the head is called for its logits
            if last and last[0] is x:  # rounded already, for another map that reads it
                return last[1]
            flat = x.float().reshape(-1, x.shape[-1])
            scale = (
                scales(flat.abs().amax(dim=-1, keepdim=True), self.format)
                if self.scales is None
                else self.scales[place].to(x.device)
            )
            rounded = quantised(flat, scale, self.format)
            there = excluded.to(x.device)
            rows = [(rounded - flat).square_().sum(dim=-1), flat.square().sum(dim=-1)]
            batch_sums[place] = torch.stack([of.where(keep, 0).sum() for keep in (~there, there) for of in rows])
            last[:] = [x, rounded.reshape(x.shape).to(x.dtype)]
            return last[1]

        with hooks.edit(readers(self.decoder, self.inputs), change):
            yield
        for device in {sums.device for sums in batch_sums.values()}:
            places = [place for place, sums in batch_sums.items() if sums.device == device]
            together = torch.stack([batch_sums[place] for place in places]).double().cpu()
            for place, sums in zip(places, together, strict=True):
                self.sums[place] = self.sums.get(place, 0) + sums

    def errors(self) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
        """For each linear input the relative error over the ordinary tokens, and over those excluded."""
        both = []
        for start in (0, 2):
            of = [self.sums[place][start : start + 2].tolist() for place in range(len(self.inputs))]
            both.append(tuple(math.sqrt(e / s) if s > 0 and math.isfinite(e / s) else None for e, s in of))
        return both[0], both[1]
