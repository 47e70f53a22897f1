"""Maxima of linear inputs against stored activations, and the file of scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from hostile import masks
from masked import model_of
from melayer.data.rows import Row
from melayer.errors import InputError, OutputError
from melayer.model import wiring
from melayer.numerics.grids import FORMATS, LARGEST
from melayer.quantisation.calibration import ABOUT, GRANULARITIES, TENSORS, ScaleSet, maxima, read_scales, write_scales
from melayer.quantisation.linear_inputs import LinearInput, find_linear_inputs

LENGTH = 7


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, toys.VOCAB - 1, (n, LENGTH - 1), generator=generator).tolist()
    return [Row(index, "", (toys.X, *ids), (), 0, False) for index, ids in enumerate(drawn)]


@pytest.fixture(scope="module")
def decoder():
    # In float64: what a float32 sum loses is the processor's, and below what a maximum may be as a part of its terms.
    return wiring.read(model_of("llama", dtype=torch.float64))


@pytest.fixture(scope="module")
def inputs(decoder):
    return find_linear_inputs(decoder).inputs


def stored(decoder, inputs, given):
    """[n, T, d] of each linear input, all sequences at once."""
    read, handles = {}, []
    for place, at in enumerate(inputs):
        keep = lambda module, args, place=place: read.__setitem__(place, args[0].float())  # noqa: E731
        handles.append(decoder.model.get_submodule(at.names[0]).register_forward_pre_hook(keep))
    with torch.no_grad():
        decoder.model(torch.tensor([row.ids for row in given]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [read[place] for place in range(len(inputs))]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_they_are_those_of_the_stored_activations(decoder, inputs, data):
    given_rows = rows(data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 3)))
    excluded = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), min_size=len(given_rows),
                           max_size=len(given_rows)))
    )  # fmt: skip
    found = maxima(decoder, inputs, given_rows, excluded, max_batch_tokens=data.draw(st.integers(1, 40)))
    for place, x in enumerate(stored(decoder, inputs, given_rows)):
        assert torch.allclose(found.whole[place], x.abs().amax((0, 1)), rtol=1e-5)
        kept = x.abs().masked_fill(excluded[:, :, None], 0).amax((0, 1))
        assert torch.allclose(found.without[place], kept, rtol=1e-5)


def test_the_massive_token_left_out_makes_a_finer_grid(decoder, inputs):
    excluded = torch.zeros(3, LENGTH, dtype=torch.bool)
    excluded[:, 0] = True
    found = maxima(decoder, inputs, rows(3), excluded, max_batch_tokens=2048)
    place = next(place for place, at in enumerate(inputs) if (at.layer, at.paths[0]) == (3, "mlp.down_proj"))
    whole, without = (found.scales("int8", "per-tensor", left_out=left_out)[place] for left_out in (False, True))
    assert whole > 20 * without


def test_scales_by_granularity(decoder, inputs):
    found = maxima(decoder, inputs, rows(2), torch.zeros(2, LENGTH, dtype=torch.bool), max_batch_tokens=2048)
    for format in FORMATS:
        tensor, channel = (found.scales(format, of, left_out=False) for of in ("per-tensor", "per-channel"))
        assert found.scales(format, "per-token", left_out=False) is None
        for at, one, each, largest in zip(inputs, tensor, channel, found.whole, strict=True):
            assert one.shape == ()
            assert each.shape == (at.width,)
            assert one == largest.max() / LARGEST[format]
            assert one == each.max()


def test_progress_and_half_precision():
    decoder = wiring.read(toys.make("llama", dtype=torch.bfloat16))
    inputs, calls = find_linear_inputs(decoder).inputs, []
    found = maxima(
        decoder,
        inputs,
        rows(3),
        torch.zeros(3, LENGTH, dtype=torch.bool),
        max_batch_tokens=LENGTH,
        progress=lambda *given: calls.append(given),
    )
    assert calls == [(LENGTH, 3 * LENGTH), (2 * LENGTH, 3 * LENGTH), (3 * LENGTH, 3 * LENGTH)]
    assert all(of.dtype == torch.float32 for of in found.whole)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(decoder, inputs):
    found = maxima(decoder, inputs, rows(2), torch.zeros(2, LENGTH, dtype=torch.bool), max_batch_tokens=2048)
    return {
        ScaleSet("plain", format, of): steps
        for format in FORMATS
        for of in GRANULARITIES
        if (steps := found.scales(format, of, left_out=False)) is not None
    }


ABOUT_MODEL = {"model": {"fingerprint": "f00d"}}


def test_round_trip(tmp_path, inputs, sets):
    write_scales(tmp_path / "new", inputs, sets, ABOUT_MODEL)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {TENSORS, ABOUT}
    for of, steps in sets.items():
        read = read_scales(tmp_path / "new", inputs, of, "f00d")
        assert all(torch.equal(one, other) for one, other in zip(read, steps, strict=True))


def test_they_are_not_read_for_another_model_or_setting(tmp_path, inputs, sets):
    write_scales(tmp_path, inputs, sets, ABOUT_MODEL)
    of = next(iter(sets))
    with pytest.raises(InputError, match=r"are of weights with fingerprint f00d; these have beef. Calibrate again"):
        read_scales(tmp_path, inputs, of, "beef")
    with pytest.raises(InputError, match=r"have no 'baked/int8/per-tensor/.*Calibrate again with this setting"):
        read_scales(tmp_path, inputs, ScaleSet("baked", "int8", "per-tensor"), "f00d")
    with pytest.raises(InputError, match=r"holds no scales.json and scales.safetensors"):
        read_scales(tmp_path / "elsewhere", inputs, of, "f00d")
    for name, said in ((TENSORS, "cannot be read"), (ABOUT, "cannot be read")):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(InputError, match=said):
            read_scales(tmp_path, inputs, of, "f00d")
        (tmp_path / name).write_bytes(kept)


def test_nothing_is_half_written(tmp_path, inputs, sets):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"The scales cannot be written to .*Give another place"):
        write_scales(tmp_path / "file", inputs, sets, ABOUT_MODEL)
    with pytest.raises(TypeError):
        write_scales(tmp_path / "out", inputs, sets, {"x": object()})
    assert list((tmp_path / "out").iterdir()) == []


def test_a_scale_that_was_changed_is_not_read(tmp_path, inputs, sets):
    write_scales(tmp_path, inputs, sets, ABOUT_MODEL)
    of, name = next(iter(sets)), tmp_path / TENSORS
    content = name.read_bytes()
    name.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    with pytest.raises(InputError, match=r"scales.safetensors is not as it was written .*Write them again"):
        read_scales(tmp_path, inputs, of, "f00d")
    name.write_bytes(content)
    about = tmp_path / ABOUT
    about.write_text(about.read_text().replace('"width": ', '"width": 1', 1))
    with pytest.raises(InputError, match=r"it is not as it was written .*Write them again"):
        read_scales(tmp_path, inputs, of, "f00d")


@pytest.mark.parametrize("name", [TENSORS, ABOUT])
def test_what_others_put_there_stays(tmp_path, inputs, sets, name):
    write_scales(tmp_path, inputs, sets, ABOUT_MODEL)
    write_scales(tmp_path, inputs, sets, {**ABOUT_MODEL, "again": True})  # ours
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_text("somebody's")
    with pytest.raises(OutputError, match=f"{name} was not written by melayer"):
        write_scales(other, inputs, sets, ABOUT_MODEL)
    assert [(path.name, path.read_text()) for path in other.iterdir()] == [(name, "somebody's")]


ONE = LinearInput(layer=0, paths=("a",), names=("a",), width=4)
OF = ScaleSet("plain", "int8", "per-tensor")


@pytest.mark.parametrize("name", masks.SCALES)
def test_files_that_are_no_scales(name, tmp_path):
    masks.SCALES[name](tmp_path / "s")
    with pytest.raises(InputError) as refused:
        read_scales(tmp_path / "s", [ONE], OF, "f00d")
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_the_builders_differ_from_a_good_one(tmp_path):
    masks._scales()(tmp_path)
    assert read_scales(tmp_path, [ONE], OF, "f00d") == (torch.tensor(0.5),)
