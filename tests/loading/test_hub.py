"""The hub is not reached: a fake stands in for its client, with the names and the errors of the real one."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

import melayer
import toys
from melayer.errors import ModelError
from melayer.loading import hub
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
