"""A sequence that goes on from a baked prefix against the whole sequence; the prefix on the disk."""

import json

import pytest
import torch

import toys
from hostile import masks
from masked import ME, mask_of, model_of
from melayer.data.rows import Row, batches
from melayer.errors import InputError, OutputError
from melayer.interventions.baked_prefix import ABOUT, TENSORS, BakedPrefix
from melayer.interventions.mask import WeMask
from melayer.model import wiring
from melayer.model.hooks import cache_argument
from melayer.model.losses import losses

PREFIX = (toys.X, 4, 9)


def batch(n=3, length=10, prefix=PREFIX):
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(3, toys.VOCAB - 1, (n, length), generator=generator).tolist()
    rows = [Row(index, "", (*prefix, *ids), (), 0, False) for index, ids in enumerate(drawn)]
    (found,) = batches(rows)
    return found


def behind(given, n_prefix):
    """The same batch without its prefix."""
    rows = [Row(row.index, "", row.ids[n_prefix:], (), 0, False) for row in given.rows]
    (found,) = batches(rows)
    return found


def of_whole(decoder, given, n_prefix):
    return losses(decoder, given).reshape(len(given.rows), -1)[:, n_prefix:]


def of_rest(decoder, given, baked):
    n = len(given.rows)
    return losses(decoder, behind(given, len(baked.ids)), cache=baked.rows(n)).reshape(n, -1)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_going_on_from_it_is_the_whole_sequence(family):
    model = model_of(family)
    decoder = wiring.read(model)
    for prefix in (PREFIX, PREFIX[:1]):
        baked = BakedPrefix.of(model, prefix)
        for n in (1, 3):
            given = batch(n, prefix=prefix)
            whole = of_whole(decoder, given, len(prefix))
            assert torch.allclose(of_rest(decoder, given, baked), whole, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_next"])
def test_a_mask_in_it_is_the_mask_on_the_whole_sequence(family):
    model = model_of(family)
    decoder = wiring.read(model)
    mask = mask_of(rate=0.9)
    baked = BakedPrefix.of(model, PREFIX[:1], mask)
    given = batch(prefix=PREFIX[:1])
    with mask.apply(model):
        masked = of_whole(decoder, given, 1)
    assert not torch.allclose(masked, of_whole(decoder, given, 1), atol=1e-4)
    assert torch.allclose(of_rest(decoder, given, baked), masked, atol=2e-5)


def test_rows_are_copies():
    model = model_of("llama")
    baked = BakedPrefix.of(model, PREFIX)
    kept = [layer.keys.clone() for layer in baked.cache.layers]
    for n in (1, 2):
        cache = baked.rows(n)
        assert cache.layers[0].keys.shape[0] == n
        with torch.no_grad():
            model(torch.full((n, 4), 7), use_cache=True, **{cache_argument(model): cache})
        assert cache.get_seq_length() == len(PREFIX) + 4
        assert baked.cache.get_seq_length() == len(PREFIX)
    assert all(torch.equal(one, layer.keys) for one, layer in zip(kept, baked.cache.layers, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", [family for family in toys.FAMILIES if family not in toys.HYBRID])
def test_it_is_read_as_it_was_written(family, masked, tmp_path):
    model = model_of(family)
    decoder = wiring.read(model)
    baked = BakedPrefix.of(model, PREFIX, mask_of() if masked else None)
    assert baked.unwritable is None
    assert baked.save(tmp_path) == tmp_path
    read = BakedPrefix.load(tmp_path, model)
    assert (read.ids, read.fingerprint) == (PREFIX, baked.fingerprint)
    assert read.mask == (mask_of() if masked else None)
    for one, other in zip(read.cache.layers, baked.cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    given = batch()
    assert torch.equal(of_rest(decoder, given, read), of_rest(decoder, given, baked))


def test_it_is_read_in_the_dtype_of_the_model(tmp_path):
    model = model_of("llama", dtype=torch.bfloat16)
    baked = BakedPrefix.of(model, PREFIX)
    baked.save(tmp_path)
    assert BakedPrefix.load(tmp_path, model).cache.layers[0].keys.dtype == torch.bfloat16


def test_generation_begins_with_it():
    model = model_of("llama")
    ids = torch.tensor([[*PREFIX, 11, 12]])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    baked = BakedPrefix.of(model, PREFIX)
    on = model.generate(ids, past_key_values=baked.rows(1), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(plain, on)


@pytest.mark.parametrize("family", toys.HYBRID)
def test_a_state_is_not_written(family, tmp_path):
    baked = BakedPrefix.of(model_of(family), PREFIX)
    with pytest.raises(
        InputError, match=r"cannot be written: the cache of block \d+ is not the keys and values of all 3"
    ):
        baked.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_window_has_dropped_is_not_written():
    model = toys.make("gemma3")
    width = min(value for value in (model.config.sliding_window,) if value)
    assert "a window drops old ones" in BakedPrefix.of(model, range(3, width + 6)).unwritable


def test_bad_input(tmp_path):
    model = model_of("llama")
    with pytest.raises(InputError, match=r"The prefix has shape"):
        BakedPrefix.of(model, [])
    with pytest.raises(InputError, match=r"Only a mask on first tokens can be baked"):
        BakedPrefix.of(model, PREFIX, WeMask(me_layer=ME, massive_above=1.0, positions="massive"))
    with pytest.raises(InputError, match=r"holds no baked prefix"):
        BakedPrefix.load(tmp_path, model)
    BakedPrefix.of(model, PREFIX).save(tmp_path)
    with pytest.raises(InputError, match=r"was computed by weights with fingerprint .*Bake it again with this model"):
        BakedPrefix.load(tmp_path, toys.make("llama", seed=1))
    about = json.loads((tmp_path / ABOUT).read_text())
    (tmp_path / ABOUT).write_text(
        json.dumps({key: value for key, value in about.items() if key not in ("ids", "crc32")})
    )
    with pytest.raises(InputError, match=r"cannot be read: ids: Field required. Write it again"):
        BakedPrefix.load(tmp_path, model)
    (tmp_path / ABOUT).write_text(json.dumps({**about, "ids": [9, *about["ids"][1:]]}))
    with pytest.raises(InputError, match=r"cannot be read: it is not as it was written .*Write it again"):
        BakedPrefix.load(tmp_path, model)
    (tmp_path / ABOUT).write_text(json.dumps(about))
    content = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"prefix.safetensors is not as it was written .*Write it again"):
        BakedPrefix.load(tmp_path, model)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:50])
    with pytest.raises(InputError, match=r"cannot be read: .*Write it again"):
        BakedPrefix.load(tmp_path, model)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"The prefix cannot be written to .*Give another place"):
        BakedPrefix.of(model, PREFIX).save(tmp_path / "file")


@pytest.mark.parametrize("name", masks.PREFIXES)
def test_files_that_are_no_prefix(name, tmp_path):
    model = model_of("llama")
    masks.PREFIXES[name](tmp_path / "p")
    about = tmp_path / "p" / ABOUT
    if about.is_file() and masks.prefix_about()["fingerprint"].encode() in about.read_bytes():
        # Of this very model, so that it is refused for what is wrong with it.
        text = about.read_bytes().replace(b"0" * 16, BakedPrefix.of(model, PREFIX).fingerprint.encode())
        about.write_bytes(text)
    with pytest.raises(InputError) as refused:
        BakedPrefix.load(tmp_path / "p", model)
    assert "fingerprint 0000" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_the_builders_differ_from_a_good_one(tmp_path):
    """What they change is what is refused: unchanged it is taken."""
    model = model_of("llama")
    fingerprint = BakedPrefix.of(model, PREFIX).fingerprint
    masks._prefix(masks.prefix_about(fingerprint=fingerprint))(tmp_path)
    assert BakedPrefix.load(tmp_path, model).ids == (1, 5, 9)
