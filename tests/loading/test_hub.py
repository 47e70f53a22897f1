"""The hub is not reached: a fake stands in for its client, with the names and the errors of the real one."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

import melayer
import toys
from hostile import checkpoints as hostile
from melayer.errors import ModelError
from melayer.loading import hub
from melayer.loading.checkpoint import weight_hashes
from melayer.loading.files import INDEX

TEXTS = [toys.text(20, x_at=0)]


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "remote"
    toys.plant(toys.make("llama"), [(3, 7, 3000.0)]).save_pretrained(directory, max_shard_size="100KB")
    toys.tokenizer().save_pretrained(directory)
    (directory / "consolidated.safetensors").write_bytes(b"another copy of the weights")
    return directory


@pytest.fixture
def fake(checkpoint, tmp_path, monkeypatch):
    """A hub with one repository, and a cache; both can be looked into."""
    cache = tmp_path / "cache"
    state = SimpleNamespace(
        remote=checkpoint, snapshot=cache / "snapshots" / "abc", fetched=[], free=10**12, reason=None
    )

    def model_info(self, name, *, revision=None, files_metadata=False):
        assert files_metadata
        if state.reason is not None:
            raise state.reason
        files = [SimpleNamespace(rfilename=f.name, size=f.stat().st_size) for f in state.remote.iterdir()]
        return SimpleNamespace(sha="abc", siblings=files)

    def fetch(file):
        state.snapshot.mkdir(parents=True, exist_ok=True)
        state.fetched.append(file)
        return shutil.copy(state.remote / file, state.snapshot / file)

    def snapshot_download(name, *, revision, allow_patterns):
        assert revision == "abc"
        for file in allow_patterns:
            fetch(file)
        return str(state.snapshot)

    def cached(name, file, revision=None):
        found = state.snapshot / file
        return str(found) if found.exists() else None

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: fetch(file))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda place: SimpleNamespace(free=state.free))
    return state


def test_a_checkpoint_is_fetched_and_measured(fake):
    assert melayer.locate_frugal("some/model", texts=TEXTS).me_layer == 3
    assert "consolidated.safetensors" not in fake.fetched
    assert INDEX in fake.fetched


def test_what_does_not_fit_is_not_fetched(fake):
    shards = [file for file in fake.remote.iterdir() if "-of-" in file.name]
    needed = sum(f.stat().st_size for f in fake.remote.iterdir() if f.name != "consolidated.safetensors")
    fake.free = needed - 10**5
    with pytest.raises(
        ModelError, match=r"some/model does not fit on the disk: .* GB are still to be fetched, and .* left"
    ):
        hub.fetch("some/model")
    assert set(fake.fetched) <= {INDEX}
    # What is there already needs no room.
    fake.snapshot.mkdir(parents=True, exist_ok=True)
    for file in shards:
        shutil.copy(file, fake.snapshot / file.name)
    assert hub.fetch("some/model") == fake.snapshot


def test_without_the_hub_the_cache_does(fake):
    first = hub.fetch("some/model")
    fake.reason = ConnectionError("no network")
    assert hub.fetch("some/model") == first
    assert melayer.locate_frugal("some/model", texts=TEXTS).me_layer == 3


@pytest.mark.parametrize(
    "reason",
    [
        ConnectionError("no network"),
        RepositoryNotFoundError("no such repository", response=SimpleNamespace(headers={}, request=None)),
    ],
    ids=["network", "repository"],
)
def test_what_is_nowhere_is_said(fake, reason):
    fake.reason = reason
    with pytest.raises(ModelError, match="'some/model' is not a file or directory here, and it cannot be had .*: no "):
        hub.fetch("some/model")


def test_pickles_on_the_hub_are_not_fetched(fake):
    for file in fake.remote.glob("model*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no safetensors weights on the hub"):
        hub.fetch("some/model")
    assert set(fake.fetched) <= {"config.json"}


def test_a_shard_that_is_not_on_the_hub(fake):
    index = json.loads((fake.remote / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-lost.safetensors"
    (fake.remote / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names model-lost.safetensors, which is not there"):
        hub.fetch("some/model")


def test_a_whole_load_is_fetched_the_same_way(fake):
    """What is read is one directory: what an index leads to, and which files are hashed, is the same as of one here."""
    model, tokenizer, _ = melayer.load("some/model")
    assert melayer.locate(model, tokenizer, texts=TEXTS).me_layer == 3
    shards = {file.name for file in fake.remote.iterdir() if "-of-" in file.name}
    assert set(weight_hashes(model)) == shards
    assert "consolidated.safetensors" not in fake.fetched


def test_an_index_on_the_hub_that_leads_elsewhere(fake, tmp_path):
    index = json.loads((fake.remote / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = str(tmp_path / "outside.safetensors")
    (fake.remote / INDEX).write_text(json.dumps(index))
    for load in (melayer.load, melayer.locate_frugal):
        with pytest.raises(ModelError, match="which is no file below its directory"):
            load("some/model")


def test_pickles_on_the_hub_are_fetched_if_asked(fake):
    reference = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    for file in [*fake.remote.glob("*.safetensors"), fake.remote / INDEX]:
        file.unlink()
    torch.save(reference.state_dict(), fake.remote / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"It has pickles \(pytorch_model.bin\).* pass --allow-pickle"):
        melayer.load("some/model")
    assert fake.fetched == []
    model = melayer.load("some/model", allow_pickle=True).model
    assert torch.equal(model.model.norm.weight, reference.model.norm.weight)


@pytest.fixture
def adapter_on_the_hub(fake, tmp_path):
    """An adapter on the hub, for a model here."""
    fake.remote.rename(tmp_path / "base")
    hostile.adapter(fake.remote, str(tmp_path / "base"))
    return fake


def test_an_adapter_on_the_hub(adapter_on_the_hub, tmp_path):
    model = melayer.load("some/adapter").model
    here = melayer.load(str(adapter_on_the_hub.remote)).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), here.parameters(), strict=True))
    with pytest.raises(ModelError, match="some/adapter holds an adapter, which is merged .* Leave --frugal out"):
        melayer.locate_frugal("some/adapter")


def test_a_pickled_adapter_on_the_hub(adapter_on_the_hub):
    (adapter_on_the_hub.remote / "adapter_model.safetensors").unlink()
    torch.save(hostile._lora(), adapter_on_the_hub.remote / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"It has pickles \(adapter_model.bin\).* pass --allow-pickle"):
        melayer.load("some/adapter")
    assert adapter_on_the_hub.fetched == []
    melayer.load("some/adapter", allow_pickle=True)


def test_code_of_an_adapter_on_the_hub_does_not_run(adapter_on_the_hub, tmp_path):
    own = {"AutoTokenizer": ["mine.MyTokenizer", "mine.MyTokenizer"]}
    config = adapter_on_the_hub.remote / "tokenizer_config.json"
    hostile.changed(config, tokenizer_class="MyTokenizer", auto_map=own)
    hostile.code(tmp_path, adapter_on_the_hub.remote)
    with pytest.raises(ModelError, match="brings its own modelling code"):
        melayer.load("some/adapter")
    assert not hostile.ran(tmp_path)
