"""What rounding the inputs of the linear maps to a few bits loses, and how much of it is the massive tokens' doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from melayer.census.observe import Place, watched
from melayer.data.rows import Batch
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.numerics.grids import Format, quantised, scales

LINEAR_INPUTS = ("attn_in", "attn_act", "ffn_in", "ffn_act")
"""The sites that a block's linear maps read."""

KINDS = ("tensor", "tensor without massive", "channel", "channel without massive", "token")
"""One scale for a sequence, one for each dimension of it, or one for each token; `without massive`: from the other
tokens alone."""

_CACHED = 1 << 16  # values at once for each thread of a CPU, as in reduction


def linear_input_places(decoder: Decoder) -> tuple[Place, ...]:
    """The linear inputs that the model has."""
    return tuple(Place(site, block.layer) for block in decoder.blocks for site in LINEAR_INPUTS if site in block.sites)


def reconstruct(
    decoder: Decoder, batch: Batch, places: Sequence[Place], massive: NDArray[np.bool_], formats: Sequence[Format]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The squared errors of the ordinary tokens, and the squares that they are of.

    Scales are taken from each sequence as it comes, so that a row never depends on its neighbours. A massive token
    counts in no error; it does its harm through the scale.

    Args:
        decoder: The model's parts.
        batch: Sequences, padded on the right.
        places: From `linear_input_places`.
        massive: [batch, seq] which tokens are massive.
        formats: Grids of `quantisation`.

    Returns:
        [places, formats, KINDS] sums of (x - Q(x))^2, and [places] sums of x^2.
    """
    real = batch.attention_mask.bool()
    ordinary = real & ~torch.from_numpy(massive)
    number = {place: at for at, place in enumerate(places)}
    # Taken before the blocks run, see `reduction.Reduction`; each place is on one device, and 0 on the others.
    kept: dict[torch.device, _Lost] = {}

    def see(place: Place, x: torch.Tensor) -> None:
        if x.device not in kept:
            kept[x.device] = _Lost(
                torch.zeros(len(places), len(formats), len(KINDS), dtype=torch.float64, device=x.device),
                torch.zeros(len(places), dtype=torch.float64, device=x.device),
                real.to(x.device),
                ordinary.to(x.device),
            )
        _add(kept[x.device], number[place], x, formats)

    with hooks.watch(watched(decoder, places), see):
        forward(decoder.model, batch)
    errors = sum(found.errors.cpu().numpy() for found in kept.values())
    return np.asarray(errors), np.asarray(sum(found.energies.cpu().numpy() for found in kept.values()))


class _Lost(NamedTuple):
    """The sums of one device, and which tokens go into them."""

    errors: torch.Tensor
    """[places, formats, KINDS], float64."""
    energies: torch.Tensor
    """[places], float64."""
    real: torch.Tensor
    """[batch, seq]"""
    ordinary: torch.Tensor
    """[batch, seq]"""


def _add(into: _Lost, place: int, x: torch.Tensor, formats: Sequence[Format]) -> None:
    """Adds what is lost of x [batch, seq, d]."""
    batch, seq, width = x.shape
    at_once = torch.get_num_threads() * _CACHED if x.device.type == "cpu" else x.numel()
    rows, tokens = max(1, at_once // (seq * width)), max(1, at_once // width)
    found, energy, real, ordinary = into.errors[place], into.energies[place], into.real, into.ordinary
    for row in range(0, batch, rows):
        some = slice(row, row + rows)
        token_max = torch.cat([part.float().abs().amax(-1) for part in torch.split(x[some], tokens, dim=1)], dim=1)
        finite = torch.isfinite(token_max)
        by_kind = _maxima(x[some], token_max, real[some] & finite, ordinary[some] & finite, tokens)
        by_format = [[scales(largest, format) for largest in by_kind] for format in formats]
        counts = (ordinary[some] & finite).float()
        for start in range(0, seq, tokens):
            span = slice(start, start + tokens)
            part = x[some, span].float()
            weight = counts[:, span]
            # A product with 0 would keep the NaN of a token that does not count.
            part = torch.where(weight.unsqueeze(-1) > 0, part, 0.0)
            energy += part.square().sum(-1).double().sum()
            for which, (format, steps) in enumerate(zip(formats, by_format, strict=True)):
                for kind, scale in enumerate(steps):
                    step = scale[:, span] if scale.shape[1] == seq else scale
                    lost = quantised(part, step, format).sub_(part).square_().sum(-1)
                    found[which, kind] += lost.double().sum()


def _maxima(
    x: torch.Tensor, token_max: torch.Tensor, real: torch.Tensor, ordinary: torch.Tensor, tokens: int
) -> list[torch.Tensor]:
    """For each of KINDS the maxima that its scales come from: [batch, 1 or seq, 1 or d]."""
    channel = torch.zeros(2, len(x), 1, x.shape[-1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[1], tokens):
        span = slice(start, start + tokens)
        magnitude = x[:, span].float().abs()
        for side, flags in enumerate((real, ordinary)):
            kept = torch.where(flags[:, span].unsqueeze(-1), magnitude, 0.0)
            channel[side] = torch.maximum(channel[side], kept.amax(1, keepdim=True))
    every, others = channel
    return [
        every.amax(-1, keepdim=True),
        others.amax(-1, keepdim=True),
        every,
        others,
        token_max.unsqueeze(-1).nan_to_num(posinf=0.0),
    ]
