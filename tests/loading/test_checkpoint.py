import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import melayer
import toys
from melayer.errors import InputError, ModelError
from melayer.loading import checkpoint

IDS = torch.tensor([[5, 9, toys.X, 12, 7]])


def test_a_directory_is_loaded_as_it_is(toy_directory):
    loaded = melayer.load(str(toy_directory))
    assert loaded.mask is None
    reference = AutoModelForCausalLM.from_pretrained(toy_directory)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, reference(IDS).logits)
    assert not loaded.model.training
    model, tokenizer, mask = loaded
    assert tokenizer("X")["input_ids"] == [toys.X]


def test_dtype(toy_directory, tmp_path):
    assert melayer.load(str(toy_directory), dtype="bfloat16").model.dtype == torch.bfloat16
    half = tmp_path / "half"
    shutil.copytree(toy_directory, half)
    toys.make("llama", dtype=torch.float16).save_pretrained(half)
    assert melayer.load(str(half)).model.dtype == torch.float16  # auto: the checkpoint's own
    with pytest.raises(ModelError, match="dtype 'float8' is not known; expected one of auto, float32"):
        melayer.load(str(toy_directory), dtype="float8")


def test_device_map(toy_directory):
    loaded = melayer.load(str(toy_directory), device_map={"": "cpu"})
    assert melayer.locate(loaded.model, loaded.tokenizer, texts=[toys.text(20, x_at=4)]).me_layer == 3


def test_weights_offloaded_to_disk_are_measured_the_same(toy_directory, tmp_path):
    text = toys.text(20, x_at=4)
    whole = melayer.load(str(toy_directory))
    expected = melayer.locate(whole.model, whole.tokenizer, texts=[text])
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(toys.N_LAYERS)}
    model = AutoModelForCausalLM.from_pretrained(toy_directory, device_map=device_map, offload_folder=tmp_path / "off")
    assert any(p.device.type == "meta" for p in model.parameters())
    found = melayer.locate(model, whole.tokenizer, texts=[text])
    assert found.me_layer == expected.me_layer == 3
    assert [row.max_abs for row in found.blocks] == pytest.approx([row.max_abs for row in expected.blocks])


@pytest.mark.parametrize("device", ["cuda:17", "nothing", "meta", "hpu", "mkldnn", "privateuseone", "", "cpu:-1"])
def test_a_device_that_is_not_there(toy_directory, device):
    with pytest.raises(ModelError, match="Use --device auto, or cpu"):
        melayer.load(str(toy_directory), device=device)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/dir", "a/b/c", "not a model"])
def test_no_such_model(name):
    with pytest.raises(ModelError, match="There is no model .* Give `demo`, a directory, a .gguf file or a hub id"):
        melayer.load(name)


def test_no_such_file():
    with pytest.raises(ModelError, match="There is no file nowhere.gguf"):
        melayer.load("nowhere.gguf")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="'nobody/nothing' is not a file or directory here, and it cannot be had from"):
        melayer.load("nobody/nothing")


def test_a_file_that_is_not_a_model(toy_directory):
    with pytest.raises(ModelError, match="is a file that is not a .gguf model. Give the directory"):
        melayer.load(str(toy_directory / "config.json"))


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelError, match="holds no config.json, so it is not a model"):
        melayer.load(str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="It holds m.gguf: name that file"):
        melayer.load(str(tmp_path))


def copy_of(directory, target):
    shutil.copytree(directory, target)
    return target


def test_a_directory_without_weights(toy_directory, tmp_path):
    copy = copy_of(toy_directory, tmp_path / "m")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights: expected model.safetensors, or .* and its shards"):
        melayer.load(str(copy))


@pytest.mark.parametrize("keep", [3, 200, -10])
def test_corrupt_safetensors(toy_directory, tmp_path, keep):
    copy = copy_of(toy_directory, tmp_path / "m")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(
        ModelError, match="model.safetensors is damaged and cannot be read .* Download or copy it again"
    ):
        melayer.load(str(copy))


def test_a_shard_that_is_missing(toy_directory, tmp_path):
    copy = copy_of(toy_directory, tmp_path / "m")
    (copy / "model.safetensors").unlink()
    toys.make("llama").save_pretrained(copy, max_shard_size="100KB")
    next(iter(sorted(copy.glob("*-of-*.safetensors")))).unlink()
    with pytest.raises(ModelError, match=r"names 11 shards, and 1 of them are not there \(the first is model-00001"):
        melayer.load(str(copy))


def test_pickles_are_refused_and_the_advice_works(toy_directory, tmp_path):
    copy = copy_of(toy_directory, tmp_path / "m")
    (copy / "model.safetensors").unlink()
    reference = toys.make("llama")
    torch.save(reference.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"are pickles \(pytorch_model.bin\).* pass --allow-pickle \(allow_pickle=True\)"
    ):
        melayer.load(str(copy))
    loaded = melayer.load(str(copy), allow_pickle=True)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, reference(IDS).logits)


def test_missing_weights_are_not_made_up(toy_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = copy_of(toy_directory, tmp_path / "m")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.4.mlp.down_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the weights .* model.layers.4.mlp.down_proj.weight"):
        melayer.load(str(copy))


def test_a_damaged_config(toy_directory, tmp_path):
    copy = copy_of(toy_directory, tmp_path / "m")
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="The config of .* cannot be read"):
        melayer.load(str(copy))


def test_a_directory_without_tokenizer(toy_directory, tmp_path):
    copy = copy_of(toy_directory, tmp_path / "m")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="The tokenizer of .* cannot be read"):
        melayer.load(str(copy))


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder-decoder model \(t5\)"):
        melayer.load(str(tmp_path))


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(vit\) is not a causal language model"):
        melayer.load(str(tmp_path))


def test_remote_code_is_not_run_unless_asked(toy_directory, tmp_path):
    copy = copy_of(toy_directory, tmp_path / "m")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "my-own", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.My"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match=r"brings its own modelling code.* pass --trust-remote-code"):
        melayer.load(str(copy))


def test_hashes_of_the_weights(toy_directory):
    import hashlib

    loaded = melayer.load(str(toy_directory))
    truth = hashlib.sha256((toy_directory / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint.weight_hashes(loaded.model) == {"model.safetensors": truth}


def test_a_map_of_devices_that_is_none(toy_directory, tmp_path):
    (tmp_path / "file").write_text("")
    for options, message in {
        ("nonsense", None, None): "There is no device map 'nonsense'|The device 'nonsense' cannot be used here",
        ("meta", None, None): "The device 'meta' holds no numbers",
        (3, None, None): "The device map is 3; expected a name or a dictionary",
        ("auto", ((9999, "1GiB"),), None): "max_memory names the device 9999, and here there are",
        (
            "auto",
            (("nonsense", "1GiB"),),
            None,
        ): "max_memory names the device 'nonsense', and here there .*cpu, disk",
        ("auto", None, str(tmp_path / "file")): "The offload folder .* cannot be used: it is no directory. Give a dir",
    }.items():
        device_map, memory, folder = options
        with pytest.raises(ModelError, match=message):
            melayer.load(
                str(toy_directory),
                device_map=device_map,
                max_memory=None if memory is None else dict(memory),
                offload_folder=folder,
            )
    assert melayer.load(str(toy_directory), device_map="cpu").model.device == torch.device("cpu")


def test_an_unforeseen_error_is_one_sentence(toy_directory, monkeypatch):
    """Whatever is raised while a model is loaded, of whatever kind."""
    for error in (RecursionError("deep"), MemoryError(), OverflowError("far"), AssertionError("odd"), KeyError("x")):

        def raising(*_, error=error, **__):
            raise error

        monkeypatch.setattr(checkpoint.files, "headers", raising)
        with pytest.raises(ModelError, match="cannot be loaded: .* Check that it is whole"):
            melayer.load(str(toy_directory))


def test_a_path_is_a_name_too(toy_directory):
    assert melayer.load(toy_directory).model.config.num_hidden_layers == 8
    for other in (3, None, b"demo", ["demo"]):
        with pytest.raises(InputError, match=r"The model is .*; expected its name or its path"):
            melayer.load(other)
        with pytest.raises(InputError, match=r"The model is .*; expected its name or its path"):
            melayer.locate_frugal(other)


def test_a_revision_of_what_is_not_on_the_hub(toy_directory):
    for load in (melayer.load, melayer.locate_frugal):
        with pytest.raises(
            ModelError, match="The revision 'main' was given, but nothing is taken from the hub. Leave it"
        ):
            load(str(toy_directory), revision="main")


def test_a_tokenizer_that_does_not_know_every_word(toy_directory, tmp_path):
    """Some research vocabularies have no unknown token; what they know is measured."""
    copy = copy_of(toy_directory, tmp_path / "m")
    values = json.loads((copy / "tokenizer.json").read_text())
    values["model"]["unk_token"] = "<none>"
    (copy / "tokenizer.json").write_text(json.dumps(values))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("unk_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer, _ = melayer.load(str(copy))
    with pytest.raises(Exception, match="Missing"):
        tokenizer("unknown")
    assert melayer.locate(model, tokenizer, texts=[toys.text(20, x_at=4)]).me_layer == 3
