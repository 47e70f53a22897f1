"""What is behind the FFN's write: input dimensions of the top neuron, singular vectors, experts."""

from __future__ import annotations

import math
from typing import Literal

import torch

from melayer.measurements.explain.block_on_text import BlockOnText
from melayer.measurements.explain.figures import Direction, Driver, ExpertUse
from melayer.numerics.finite import ratio

_DRIVERS, _DIRECTIONS = 5, 5


def drivers(text: BlockOnText) -> tuple[Driver, ...]:
    """The input dimensions behind the top neuron's pre-activations, heaviest first."""
    assert text.neurons is not None
    _, expert, neuron = text.contributions()[0]
    part = next(part for part in text.neurons.parts if part.expert == expert)
    x = text.activations["ffn_in"][text.token].double()
    norm = text.block.ffn_norm
    gamma = None if norm is None else norm.gamma(text.decoder.d_model).cpu()
    rows = []
    projections: tuple[tuple[Literal["gate", "up"], torch.Tensor | None], ...] = (("gate", part.gate), ("up", part.up))
    for name, matrix in projections:
        if matrix is None:
            continue
        added = x * matrix[neuron].double().cpu()
        bias = part.biases.get(name)
        total = float(added.sum()) + (float(bias[neuron]) if bias is not None else 0.0)
        for dim in added.abs().topk(min(_DRIVERS, len(added))).indices.tolist():
            value = float(added[dim])
            rows.append(Driver(name, dim, value, ratio(value, total), None if gamma is None else float(gamma[dim])))
    return tuple(rows)


def directions(text: BlockOnText) -> tuple[Direction, ...]:
    """The FFN's write against the top left singular vectors of the down projection (the top neuron's expert's)."""
    assert text.neurons is not None
    expert = text.contributions()[0][1]
    down = next(part.down for part in text.neurons.parts if part.expert == expert).double().cpu()
    write = text.activations["ffn_raw"][text.token].double()
    # The left singular vectors of W are the eigenvectors of W W^T, which is smaller.
    squares, vectors = torch.linalg.eigh(down @ down.T)
    cosines = (vectors.T @ write).abs() / torch.linalg.vector_norm(write).clamp(min=1e-300)
    top = range(1, min(_DIRECTIONS, len(squares)) + 1)
    return tuple(Direction(rank, math.sqrt(max(float(squares[-rank]), 0.0)), float(cosines[-rank])) for rank in top)


def experts(text: BlockOnText, total: float) -> tuple[ExpertUse, ...]:
    """The experts that the token visits, with their shares of `total`, the FFN's output in the dimension."""
    rows = []
    for part in text.neurons.parts if text.neurons else ():
        if part.expert is not None:
            written = float(part.act.double() @ part.down[text.dim].double().cpu())
            written += float(part.bias[text.dim]) if part.bias is not None else 0.0
            rows.append(ExpertUse(part.expert, part.weight, ratio(written, total)))
    return tuple(rows)
