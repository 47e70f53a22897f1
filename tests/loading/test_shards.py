import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from melayer.errors import ModelError
from melayer.loading.files import INDEX, SINGLE
from melayer.loading.shards import Reader, open_shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def write(directory, tensors, n_files):
    """The tensors in `n_files` shards with an index."""
    weight_map = {}
    for number in range(n_files):
        held = dict(list(tensors.items())[number::n_files])
        if held:
            save_file(held, directory / f"s{number}.safetensors")
            weight_map |= dict.fromkeys(held, f"s{number}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@st.composite
def checkpoints(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=9))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=len(shapes), max_size=len(shapes)))
    groups = draw(st.lists(st.integers(0, 3), min_size=len(shapes), max_size=len(shapes)))
    return shapes, dtypes, groups, draw(st.integers(1, 3))


@given(checkpoint=checkpoints(), order=st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_what_is_read_is_what_was_written(checkpoint, order, tmp_path_factory):
    shapes, dtypes, groups, n_files = checkpoint
    directory = tmp_path_factory.mktemp("shards")
    tensors = {
        f"t{at}": (torch.randn(shape) * 100).to(dtype)
        for at, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    write(directory, tensors, n_files)
    shards = open_shards(directory)
    names = [[name for name, at in zip(tensors, groups, strict=True) if at == group] for group in range(4)]
    assert shards.n_bytes == sum(tensor.nbytes for tensor in tensors.values())
    with Reader(shards, names) as reader:
        for group in order:
            found = reader.get(group)
            assert set(found) == set(names[group])
            for name, tensor in found.items():
                assert tensor.dtype == tensors[name].dtype
                assert tensor.shape == tensors[name].shape
                assert torch.equal(tensor, tensors[name])
    assert all(torch.equal(shards.views[name], tensor) for name, tensor in tensors.items())


def test_the_next_group_is_read_while_one_is_at_work(tmp_path):
    save_file({f"t{at}": torch.full((5,), float(at)) for at in range(6)}, tmp_path / SINGLE)
    with Reader(open_shards(tmp_path), [[f"t{at}"] for at in range(6)]) as reader:
        first = reader.get(0)["t0"]
        second = reader.get(1)["t1"]
        assert second.tolist() == [1.0] * 5
        # The third stands where the first was.
        assert reader.get(2)["t2"].data_ptr() == first.data_ptr() != second.data_ptr()
        assert first.tolist() == [2.0] * 5


def test_a_file_that_became_shorter(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / SINGLE)
    shards = open_shards(tmp_path)
    data = (tmp_path / SINGLE).read_bytes()
    # Another file under the same name: cutting the mapped one short would take this process down.
    (tmp_path / "other").write_bytes(data[:-100])
    (tmp_path / "other").replace(tmp_path / SINGLE)
    with Reader(shards, [["a"]]) as reader, pytest.raises(ModelError, match="is damaged .* it ends at byte"):
        reader.get(0)
    (tmp_path / SINGLE).unlink()
    with Reader(shards, [["a"]]) as reader, pytest.raises(ModelError, match="cannot be read: No such file"):
        reader.get(0)


def test_a_shard_that_is_missing(tmp_path):
    write(tmp_path, {f"t{at}": torch.zeros(4) for at in range(6)}, 3)
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"names 3 shards, and 1 of them are not there \(the first is s1.safetensors\)"
    ):
        open_shards(tmp_path)


def test_a_tensor_that_is_missing_from_its_shard(tmp_path):
    write(tmp_path, {f"t{at}": torch.zeros(4) for at in range(6)}, 2)
    held = load_file(tmp_path / "s1.safetensors")
    del held["t3"]
    save_file(held, tmp_path / "s1.safetensors")
    with pytest.raises(ModelError, match="places t3 in s1.safetensors, which does not hold it"):
        open_shards(tmp_path)


@pytest.mark.parametrize("keep", [3, 40, -10])
def test_a_shard_that_is_cut_short(tmp_path, keep):
    write(tmp_path, {f"t{at}": torch.zeros(40) for at in range(4)}, 2)
    file = tmp_path / "s1.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="s1.safetensors is damaged and cannot be read .* copy it again"):
        open_shards(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match="is not an index of shards"):
        open_shards(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ModelError, match="holds no weights: expected model.safetensors, or model.safetensors.index"):
        open_shards(tmp_path)
