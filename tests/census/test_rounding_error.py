"""What rounding loses is what a plain computation says, row by row, whatever stands beside a row."""

import numpy as np
import pytest
import torch

import toys
from melayer.census import rounding_error
from melayer.model import wiring
from melayer.numerics.grids import FORMATS, quantised, scales
from observed import batch


def expected(x: torch.Tensor, massive: torch.Tensor, format: str) -> list[float]:
    """Of one row [seq, d]: the squared error of its ordinary tokens for each of KINDS."""
    others = x[~massive]
    found = []
    for kind in rounding_error.KINDS:
        seen = others if "without" in kind else x
        size = {"tensor": lambda s: s.abs().max(), "channel": lambda s: s.abs().amax(0)}.get(kind.split()[0])
        scale = scales(others.abs().amax(1, keepdim=True) if size is None else size(seen), format)
        found.append(float((quantised(others, scale, format) - others).double().square().sum()))
    return found


@pytest.mark.parametrize("cached", [1, 40, 1 << 16])
def test_errors_are_those_of_each_row_alone(monkeypatch, cached):
    monkeypatch.setattr(rounding_error, "_CACHED", cached * toys.D_MODEL)
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    decoder = wiring.read(model)
    given = batch(20, 9, 1)
    given.ids[0, 4] = toys.X
    massive = np.zeros(tuple(given.ids.shape), bool)
    massive[0, 4] = True
    places = rounding_error.linear_input_places(decoder)
    seen = {}
    original = rounding_error._add

    def add(into, at, x, formats):
        seen[at] = x.clone()
        original(into, at, x, formats)

    monkeypatch.setattr(rounding_error, "_add", add)
    errors, energies = rounding_error.reconstruct(decoder, given, places, massive, FORMATS)
    for at, place in enumerate(places):
        x = seen[at]
        rows = [(x[row, :length], torch.from_numpy(massive[row, :length])) for row, length in enumerate(given.lengths)]
        energy = sum(float(values[~flags].double().square().sum()) for values, flags in rows)
        assert energies[places.index(place)] == pytest.approx(energy, rel=1e-5)
        for number, format in enumerate(FORMATS):
            whole = np.sum([expected(values, flags, format) for values, flags in rows], axis=0)
            assert errors[places.index(place), number] == pytest.approx(whole, rel=1e-4), (place, format)


def test_a_massive_token_costs_the_others_their_precision_only_where_they_share_a_scale():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    decoder = wiring.read(model)
    given = batch(20)
    given.ids[0, 0] = toys.X
    massive = np.zeros(tuple(given.ids.shape), bool)
    massive[0, 0] = True
    places = rounding_error.linear_input_places(decoder)
    errors, energies = rounding_error.reconstruct(decoder, given, places, massive, ["int8"])
    at = places.index(rounding_error.Place("ffn_act", 3))
    relative = dict(zip(rounding_error.KINDS, np.sqrt(errors[at, 0] / energies[at]), strict=True))
    assert relative["tensor"] > 0.5
    assert relative["tensor without massive"] < 0.05
    assert relative["token"] < 0.05
    # The neuron that writes it is a channel of its own.
    assert relative["channel"] < 0.05


def test_without_a_massive_token_there_is_nothing_to_gain():
    decoder = wiring.read(toys.make("llama"))
    given = batch(20, 11)
    none = np.zeros(tuple(given.ids.shape), bool)
    errors, _ = rounding_error.reconstruct(decoder, given, rounding_error.linear_input_places(decoder), none, ["int8"])
    assert (errors[..., 0] == errors[..., 1]).all()
    assert (errors[..., 2] == errors[..., 3]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_counts_nowhere(value):
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    x[0, 4, 3] = value
    flags = torch.ones(1, 5, dtype=torch.bool)

    def lost(x, flags):
        found = rounding_error._Lost(
            torch.zeros(1, len(FORMATS), len(rounding_error.KINDS), dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
            flags,
            flags,
        )
        rounding_error._add(found, 0, x, FORMATS)
        return found.errors, found.energies

    with_it, without = lost(x, flags), lost(x[:, :4], flags[:, :4])
    assert all(torch.isfinite(part).all() for part in with_it)
    for mine, other in zip(with_it, without, strict=True):
        torch.testing.assert_close(mine, other)
