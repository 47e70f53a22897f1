"""Rounded forward passes against a model whose linear maps are replaced by ones that round what they read."""

import pytest
import torch

import toys
from masked import model_of
from melayer.data.rows import Row, batches
from melayer.model import wiring
from melayer.model.forward import forward
from melayer.numerics.grids import FORMATS, quantised, scales
from melayer.quantisation.calibration import maxima
from melayer.quantisation.linear_inputs import find_linear_inputs
from melayer.quantisation.rounding import Rounding
from rounded import flags, replaced

DENSE = [family for family in toys.FAMILIES if family not in (*toys.EXPERTS, *toys.HYBRID)]
GRANULARITIES = ("per-tensor", "per-token", "per-channel")


def rows(n=3, length=9):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(3, toys.VOCAB - 1, (n, length - 1), generator=generator).tolist()
    return [Row(index, "", (toys.X, *ids), (), 0, False) for index, ids in enumerate(drawn)]


def logits(model, batch):
    with torch.no_grad():
        return model(batch.ids, use_cache=False).logits


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", DENSE)
def test_it_is_the_model_whose_linear_maps_round(family, granularity):
    model = model_of(family)
    decoder = wiring.read(model)
    found = find_linear_inputs(decoder).inputs
    (batch,) = batches(rows())
    whole = maxima(decoder, found, rows(), flags(), max_batch_tokens=2048)
    for format in FORMATS if family == "llama" else FORMATS[:1]:
        steps = whole.scales(format, granularity, left_out=True)
        rounding = Rounding(decoder, found, format, steps, flags())
        with rounding.of(batch):
            ours = logits(model, batch)
        with replaced(model, found, format, granularity, steps) as seen:
            theirs = logits(model, batch)
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, logits(model, batch))
        error, error_excluded = rounding.errors()
        for at, off, off_excluded in zip(found, error, error_excluded, strict=True):
            x, became = (of.reshape(3, 9, -1).double() for of in seen[at.names[0]])
            for value, span in ((off, slice(1, None)), (off_excluded, slice(0, 1))):
                off_by, size = (became - x)[:, span].square().sum(), x[:, span].square().sum()
                if size < torch.finfo(torch.float32).tiny:  # int4 leaves nothing of X
                    assert value is None
                else:
                    assert value == pytest.approx((off_by / size).sqrt().item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_row_does_not_depend_on_its_neighbours(granularity):
    # In float64: in float32 another order of additions takes a value across the edge of a step.
    model = model_of("qwen3", dtype=torch.float64)
    decoder = wiring.read(model)
    found = find_linear_inputs(decoder).inputs
    steps = maxima(decoder, found, rows(), flags(), max_batch_tokens=2048).scales("int8", granularity, left_out=False)
    together, alone = (Rounding(decoder, found, "int8", steps, flags()) for _ in range(2))
    (batch,) = batches(rows())
    with together.of(batch):
        whole = logits(model, batch)
    for row in rows():
        (one,) = batches([row])
        with alone.of(one):
            assert torch.allclose(logits(model, one)[0], whole[row.index], atol=1e-5)
    for ours, theirs in zip(together.errors(), alone.errors(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_maps_get_the_dtype_of_the_model():
    model = model_of("llama", dtype=torch.bfloat16)
    decoder = wiring.read(model)
    found = find_linear_inputs(decoder).inputs
    (batch,) = batches(rows())
    read = []
    handle = model.get_submodule(found[0].names[0]).register_forward_hook(
        lambda module, args, out: read.append((args[0], out.dtype))
    )
    rounding = Rounding(decoder, found, "int8", None, flags())
    with rounding.of(batch):
        logits(model, batch)
    handle.remove()
    assert read[0][0].dtype == torch.bfloat16
    assert read[0][1] == torch.bfloat16
    # In float32 and only then in bfloat16, whose eight bits hold all steps of int8.
    steps = scales(read[0][0].float().abs().amax(-1, keepdim=True), "int8")
    assert torch.equal(quantised(read[0][0], steps, "int8").bfloat16(), read[0][0])


def test_nothing_is_left_of_it():
    model = model_of("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder = wiring.read(model)
    found = find_linear_inputs(decoder).inputs
    (batch,) = batches(rows())
    plain = logits(model, batch)
    rounding = Rounding(decoder, found, "int4", None, flags())
    with pytest.raises(KeyboardInterrupt), rounding.of(batch):
        forward(model, batch)
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(plain, logits(model, batch))


def test_maps_that_read_the_same_are_rounded_once(monkeypatch):
    calls = []
    original = quantised
    monkeypatch.setattr("melayer.quantisation.rounding.quantised", lambda *given: calls.append(1) or original(*given))
    model = toys.make("llama")
    decoder = wiring.read(model)
    found = find_linear_inputs(decoder).inputs
    assert len(found[0].names) > 1
    (batch,) = batches(rows())
    with Rounding(decoder, found, "int8", None, flags()).of(batch):
        logits(model, batch)
    assert len(calls) == len(found) == 4 * len(toys.blocks(model))
