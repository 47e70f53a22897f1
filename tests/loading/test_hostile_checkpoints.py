"""Whatever a checkpoint, a tokenizer, an adapter or a GGUF file holds: one sentence, nothing run, nothing changed."""

import hashlib
import json
import os
import subprocess
import warnings

import pytest
import torch

import melayer
import toys
from command import failing
from hostile import checkpoints as hostile
from melayer.errors import InputError, MelayerError, MelayerWarning, ModelError
from melayer.loading import files
from melayer.loading.checkpoint import weight_hashes

TEXT = "w1 w2 w3 X w4 w5 w6 w7 w8"


def contents(place):
    """What there is, and what is in it, as far as that can be read without waiting."""
    found = {}
    for path in sorted(place.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else os.lstat(path).st_mode
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory, a cache, and a working directory that are this test's own."""
    for name in ("built", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "built"


def loaded_and_located(name):
    model, tokenizer, _ = melayer.load(name)
    return melayer.locate(model, tokenizer, texts=[TEXT])


@pytest.mark.parametrize("case", hostile.CHECKPOINTS)
def test_it_is_refused_with_one_sentence_or_as_if_nothing_were_wrong(case, place, capfd):
    name = hostile.CHECKPOINTS[case](place)
    before = contents(place)
    if case in hostile.HARMLESS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MelayerWarning)
            assert loaded_and_located(name).me_layer == 3
    else:
        with pytest.raises(MelayerError) as refused:
            loaded_and_located(name)
        sentence = str(refused.value)
        assert "\n" not in sentence
        assert sentence[-1] in ".?"
        assert len(sentence) < 1000
    assert not hostile.ran(place)
    assert contents(place) == before
    assert not [path for path in (place.parent / "cache").rglob("*") if path.suffix != ".lock" and path.is_file()]
    assert not list((place.parent / "cwd").iterdir())
    assert capfd.readouterr().out == ""


def test_frugally_too(place):
    for case in ("index-leads-up-and-a-decoy", "weights-are-a-link", "config-ten-million-layers", "a-weight-is-missing",
                 "config-auto-map", "tokenizer-auto-map", "pickle-behind-an-index", "gguf-lacks-weights"):  # fmt: skip
        (place / case).mkdir()
        with pytest.raises(ModelError):
            melayer.locate_frugal(hostile.CHECKPOINTS[case](place / case), texts=[TEXT])
        assert not hostile.ran(place / case)


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["adapter-tokenizer-auto-map", "tokenizer-auto-map", "config-auto-map", "adapter-megatron"]
)
def test_a_yes_on_stdin_runs_nothing(case, place, python):
    """transformers takes no answer for a question, and puts it on stdout."""
    interpreter, environment = python
    name = hostile.CHECKPOINTS[case](place)
    done = subprocess.run(
        [interpreter, "-m", "melayer", "locate", name, "--text", TEXT],
        input="y\n" * 20, capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("melayer: ")
    assert not hostile.ran(place)


def test_the_code_would_run_if_it_were_trusted(place):
    """The test above can fail."""
    name = hostile.CHECKPOINTS["adapter-tokenizer-auto-map"](place)
    with pytest.raises(ModelError):
        melayer.load(name, trust_remote_code=True)
    assert hostile.ran(place)


@pytest.mark.parametrize("said", [None, "yes", 1])
def test_trust_is_said_as_yes_or_no(said, toy_directory):
    with pytest.raises(InputError, match=r"trust_remote_code is .*; expected True or False\."):
        melayer.load(str(toy_directory), trust_remote_code=said)
    with pytest.raises(InputError, match=r"trust_remote_code is .*; expected True or False\."):
        melayer.locate_frugal(str(toy_directory), trust_remote_code=said)


def test_a_pickled_adapter_is_read_if_asked(place):
    name = hostile.CHECKPOINTS["adapter-pickle-that-is-honest"](place)
    with pytest.raises(ModelError, match=r"are a pickle \(adapter_model.bin\).* pass --allow-pickle"):
        melayer.load(name)
    model = melayer.load(name, allow_pickle=True).model
    same = melayer.load(str(hostile.adapter(place / "same", str(place / "m")))).model
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, same(ids).logits)
    assert set(weight_hashes(model)) == {"adapter_model.bin", "model.safetensors"}
    assert set(weight_hashes(same)) == {"adapter_model.safetensors", "model.safetensors"}


# --- what is read, and what is hashed --------------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_hashed_is_what_was_loaded(place):
    """Shards that an index names, one in a directory below; another file that is called as if it were a shard."""
    directory = hostile.healthy(place / "m", shards=True)
    index = json.loads((directory / files.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    (directory / "below").mkdir()
    (directory / shards[0]).rename(directory / "below" / shards[0])
    index["weight_map"] = {k: f"below/{v}" if v == shards[0] else v for k, v in index["weight_map"].items()}
    (directory / files.INDEX).write_text(json.dumps(index))
    (directory / "consolidated.safetensors").write_bytes((directory / shards[1]).read_bytes())
    model = melayer.load(str(directory)).model
    expected = {name: sha256(directory / name) for name in [f"below/{shards[0]}", *shards[1:]]}
    assert weight_hashes(model) == expected
    changed = directory / shards[1]
    changed.write_bytes(changed.read_bytes()[:-4] + b"abcd")
    with pytest.warns(MelayerWarning, match=f"{shards[1]} has changed since the model was loaded"):
        assert weight_hashes(model) == {name: value for name, value in expected.items() if name != shards[1]}
    assert weight_hashes(toys.make("llama")) == {}


def test_a_name_that_is_given_twice_is_not_lost(place):
    """An adapter on an adapter: both files have the same name."""
    inner = hostile.adapter(place / "inner", str(hostile.healthy(place / "m")))
    outer = hostile.adapter(place / "outer", str(inner), lora_alpha=8)
    model = melayer.load(str(outer)).model
    assert weight_hashes(model) == {
        "adapter_model.safetensors": sha256(outer / "adapter_model.safetensors"),
        "base/adapter_model.safetensors": sha256(inner / "adapter_model.safetensors"),
        "model.safetensors": sha256(place / "m" / "model.safetensors"),
    }


def test_a_record_in_a_checkpoint_proves_nothing(place):
    model = melayer.load(hostile.CHECKPOINTS["claims-to-be-converted"](place)).model
    assert weight_hashes(model) == {"model.safetensors": sha256(place / "m" / "model.safetensors")}


def test_the_file_that_a_config_names_is_loaded_and_hashed(place):
    directory = hostile.healthy(place / "m")
    other = toys.make("llama", seed=5)
    other.save_pretrained(place / "other")
    (directory / "mine.safetensors").write_bytes((place / "other" / "model.safetensors").read_bytes())
    hostile.changed(directory / "config.json", transformers_weights="mine.safetensors")
    model = melayer.load(str(directory)).model
    assert torch.equal(model.model.norm.weight, other.model.norm.weight)
    assert weight_hashes(model) == {"mine.safetensors": sha256(directory / "mine.safetensors")}
    located = melayer.locate(model, toys.tokenizer(), texts=[TEXT])
    assert melayer.locate_frugal(str(directory), texts=[TEXT]).model.fingerprint == located.model.fingerprint


def test_a_link_inside_the_directory_is_its_own(place):
    directory = hostile.healthy(place / "m")
    (directory / "model.safetensors").rename(directory / "weights-of-today")
    (directory / "model.safetensors").symlink_to("weights-of-today")
    (place / "alias").symlink_to(directory)
    assert loaded_and_located(str(place / "alias")).me_layer == 3


def test_blobs_that_are_a_link_are_no_cache_of_the_hub(place):
    snapshot = hostile.CHECKPOINTS["a-cache-of-the-hub"](place)
    blobs = place / "models--some--model" / "blobs"
    blobs.rename(place / "outside")
    blobs.symlink_to(place / "outside")
    with pytest.raises(ModelError, match="leads out of the model's directory"):
        melayer.load(snapshot)


# --- lacking and too much --------------------------------------------------------------------------------------------


def test_weights_with_no_place_are_said(place):
    name = hostile.CHECKPOINTS["a-block-too-much"](place)
    said = (
        r"holds 1 weights that LlamaForCausalLM has no place for \(the first is model.layers.8.mlp.down_proj.weight\)"
    )
    with pytest.warns(MelayerWarning, match=said):
        melayer.load(name)


def test_tied_weights_are_not_missing(place):
    toys.make("llama-tied").save_pretrained(place)
    toys.tokenizer().save_pretrained(place)
    first, second = (melayer.load(str(place)).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("a-weight-is-missing", "lacks 1 of the weights .* model.layers.4.mlp.down_proj.weight"),
        ("a-weight-has-another-shape", r"other shapes .*model.layers.4.mlp.down_proj.weight: \(3, 5\), not \(64, 96\)"),
        ("weights-are-integers", "holds 1 weights as whole numbers .*model.layers.4.mlp.down_proj.weight"),
        ("adapter-lacks-a-weight", "it lacks 1 weights .*layers.4.self_attn.q_proj.lora_B"),
        ("adapter-another-module", "it lacks 16 weights"),
        ("adapter-own-base", r"is its own base \(.*/a -> .*/a\)\. Name the model .* with base= \(--base\)\."),
        ("adapters-in-a-circle", r"is its own base \(.*/a -> .*/b -> .*/a\)"),
        ("config-size-string", "The config of .* cannot be read: Field 'hidden_size' expected int, got str"),
        ("config-no-heads", "The config of .* cannot be read: .*zero"),
        ("config-ten-million-layers", "says num_hidden_layers = 10,000,000, and the weights have 75 tensors"),
        ("gguf-one-part-by-header", "is one of the 3 parts of a model"),
        ("gguf-one-part-by-name", "is one of the 3 parts of a model"),
        ("gguf-lacks-weights", "lacks 9 of the weights .*model.layers.3"),
        ("gguf-blocks-huge", "says that the model has 10,000,000 blocks, and holds 39 tensors"),
        ("index-leads-up", "names '../outside/weights.safetensors' as a file of weights, which is no file below"),
        ("weights-are-a-link", "leads out of the model's directory, to .*outside/weights.safetensors"),
        ("a-weight-in-two-shards", "holds .*, which another of its files holds too"),
        ("fifo-tokenizer.json", "tokenizer.json is no plain file, so it cannot be read"),
        ("name-long", "There is no model 'a{120}…': File name too long"),
        ("name-no-such-user", "There is no model '~nosuchuser': Could not determine home directory"),
        ("name-empty", "The model's name is empty"),
        ("an-adapter-beside-whole-weights", "holds a whole model .* and an adapter .* Give each a directory"),
        ("tokenizer-beyond-the-embedding", "Token id 10.* whose embedding has 64 rows"),
    ],
)  # fmt: skip
def test_the_sentence_names_the_thing(case, said, place):
    with pytest.raises(MelayerError, match=said):
        loaded_and_located(hostile.CHECKPOINTS[case](place))


def test_an_adapter_for_a_model_without_those_modules(place):
    """What the base has no place for is not dropped."""
    name = str(hostile.adapter(place / "a", str(hostile.healthy(place / "m")), layers_to_transform=[0, 1]))
    with pytest.raises(ModelError, match="it has 12 with no place there"):
        melayer.load(name)


def test_a_named_base_ends_the_circle(place):
    name = hostile.CHECKPOINTS["adapter-own-base"](place)
    assert loaded_and_located_with_base(name, str(hostile.healthy(place / "m"))).me_layer == 3


def loaded_and_located_with_base(name, base):
    model, tokenizer, _ = melayer.load(name, base=base)
    return melayer.locate(model, tokenizer, texts=[TEXT])


# --- names, permissions ----------------------------------------------------------------------------------------------


def test_a_directory_that_may_not_be_read(toy_directory, monkeypatch):
    """Tests may run as root, whom nothing is forbidden."""

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "scandir", forbidden)
    with pytest.raises(ModelError, match="The directory .* cannot be read: Permission denied. Give one that you may"):
        melayer.load(str(toy_directory))


@pytest.mark.parametrize("case", [name for name in hostile.NAMES if name not in ("nul", "nul-path")])
def test_a_name_at_the_command_line(case, place, python):
    interpreter, environment = python
    name = hostile.NAMES[case].encode("utf-8", "surrogateescape")
    done = subprocess.run(
        [interpreter.encode(), b"-m", b"melayer", b"locate", b"--text", b"a", b"--", name], capture_output=True,
        env={**environment, "HF_HUB_OFFLINE": "1"}, timeout=300, check=False, cwd=place,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"melayer: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("case", hostile.OPTIONS)
def test_options_that_no_model_can_be_loaded_with(case, toy_directory):
    said = failing("locate", toy_directory, "--text", TEXT, *hostile.OPTIONS[case])
    assert said.endswith((".", "?"))
