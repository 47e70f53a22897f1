"""What is kept of a place is the same whichever others are kept beside it, and whichever device holds it."""

import numpy as np
import torch

import toys
from melayer.census import observe
from melayer.census.reduction import Reduction
from melayer.data.rows import Row, batches
from melayer.measurements.criterion import Criterion
from melayer.numerics import histogram


def activations(lengths, widths, seed=0):
    rows = [Row(index, "", tuple(range(3, 3 + length)), (), 0, False) for index, length in enumerate(lengths)]
    (batch,) = batches(rows, max_batch_tokens=10**6)
    generator = torch.Generator().manual_seed(seed)
    return batch, [torch.randn(*batch.ids.shape, width, generator=generator) for width in widths]


def test_places_of_several_devices_come_together_in_their_order():
    widths = [toys.D_MODEL, 8, 8, toys.D_MODEL, 5]
    batch, given = activations([9, 4], widths)
    whole = Reduction(batch, torch.device("cpu"), len(given))
    halves = [Reduction(batch, torch.device("cpu"), len(given)) for _ in range(2)]
    for place in (3, 0, 4, 1, 2):  # as blocks run, not as places are listed
        for into in (whole, halves[place % 2]):
            into.add(place, given[place], Criterion() if place == 3 else None)
    for what in (
        lambda found: found.counts,
        Reduction.sums,
        Reduction.n_finite,
        lambda found: found.maxima,
        lambda found: found.where,
        lambda found: found.dims,
    ):
        assert (observe._on_host([whole], what) == observe._on_host(halves, what)).all()
    for one, two, x in zip(observe._dim_maxima([whole], 5), observe._dim_maxima(halves, 5), given, strict=True):
        tokens = torch.cat([x[0], x[1, :4]])
        assert (one == tokens.abs().amax(0).numpy()).all()
        assert (one == two).all()


def test_nothing_is_kept_of_the_padding():
    batch, (x,) = activations([9, 4], [16])
    x[1, 4:] = torch.nan
    found = Reduction(batch, torch.device("cpu"), 1)
    found.add(0, x)
    assert found.counts.sum() == (9 + 4) * 16
    assert found.n_finite().item() == 9 + 4
    assert torch.isfinite(found.sums()).all()
    assert (found.where[0] < torch.tensor([9, 4])).all()


def test_half_precision_is_added_up_in_float32():
    batch, (x,) = activations([9], [16])
    for dtype in (torch.bfloat16, torch.float16):
        found, exact = (Reduction(batch, torch.device("cpu"), 1) for _ in range(2))
        found.add(0, x.to(dtype))
        exact.add(0, x.to(dtype).float())
        assert (found.sums() == exact.sums()).all()
        assert (found.counts == exact.counts).all()
        assert (
            found.counts[0].numpy().tolist()
            == np.bincount(histogram.bins_of(x.to(dtype).float().numpy()).ravel(), minlength=histogram.BINS).tolist()
        )
