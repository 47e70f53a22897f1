"""An observation, and the stored activations that it is held against."""

import numpy as np
import pytest
import torch

import toys
from melayer.census import observe
from melayer.census.reduction import Reduction
from melayer.data.rows import Batch, Row, batches
from melayer.measurements.criterion import Criterion
from melayer.model.decoder import Decoder
from melayer.numerics import histogram


def batch(*lengths: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        Row(index, "", tuple(torch.randint(3, toys.VOCAB - 1, (length,), generator=generator).tolist()), (), 0, False)
        for index, length in enumerate(lengths)
    ]
    (found,) = batches(rows, max_batch_tokens=10**6)
    return found


def stored(decoder: Decoder, given: Batch, places, criterion: Criterion | None = None):
    """The observation, and the very activations that it is of: {place: [batch, seq, d]}."""
    seen = {}
    original = Reduction.add

    def add(self, place, x, criterion=None):
        seen[place] = x.detach().clone()
        original(self, place, x, criterion)

    Reduction.add = add
    try:
        found = observe.observe(decoder, given, places, criterion or Criterion())
    finally:
        Reduction.add = original
    return found, {place: seen[at] for at, place in enumerate(found.places)}


def check(found: observe.Observation, activations, given: Batch) -> None:
    for at, place in enumerate(found.places):
        rows = [activations[place][row, :length].float().numpy() for row, length in enumerate(given.lengths)]
        flat = np.concatenate(rows)
        finite = np.isfinite(flat).all(axis=1)
        for row, values in enumerate(rows):
            assert found.maxima[at, row] == values.flat[np.abs(values).argmax()], place
            assert found.maxima[at, row] == values[found.tokens[at, row], found.dims[at, row]]
        bins = histogram.bins_of(flat)
        assert (found.counts[at] == np.bincount(bins.ravel(), minlength=histogram.BINS)).all()
        assert found.n_summed[at] == finite.sum() * flat.shape[1]
        exact = flat[finite].astype(np.float64)
        for power in range(4):
            size = (np.abs(exact) ** (power + 1)).sum()
            assert found.sums[at, power] == pytest.approx((exact ** (power + 1)).sum(), abs=1e-6 * size)
        assert (found.dim_maxima[at] == np.abs(flat).max(axis=0)).all()
