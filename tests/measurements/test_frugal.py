import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import melayer
import toys
from melayer.errors import InputError, ModelError
from melayer.loading import files, shards, streaming
from melayer.measurements.locate import frugal

CONTEXT = toys.text(20, x_at=4, seed=1)
TEXTS = [CONTEXT, toys.text(40, x_at=4, seed=2), toys.text(12, x_at=4, seed=3), "w1 w2"]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "frugal.py"


@pytest.fixture
def _toy_tokenizer(monkeypatch):
    """Some families have a tokenizer class that makes its own of the toys' file."""
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: toys.tokenizer())


def saved(directory, family="llama", *, writes=((3, 7, 3000.0),), dtype=torch.float32, **options):
    """A toy with a massive activation, in several shards."""
    model = toys.make(family)
    if writes:
        toys.plant(model, list(writes), context=CONTEXT)
    model.to(dtype).save_pretrained(directory, max_shard_size="100KB", **options)
    toys.tokenizer().save_pretrained(directory)
    return str(directory)


def whole(name, **options):
    loaded = melayer.load(name)
    return melayer.locate(loaded.model, loaded.tokenizer, name=name, **{"texts": TEXTS, "max_tokens": 32, **options})


def assert_same(found, expected, at="", *, rel=1e-5, abs=1e-6):
    """Equal, numbers up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_same(found[key], expected[key], f"{at}/{key}", rel=rel, abs=abs)
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{at}/{place}", rel=rel, abs=abs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=abs), at
    else:
        assert found == expected, at


def figures(result):
    """`to_dict()` without what says how it came to be, and without other first tokens, which would need more runs."""
    values = result.to_dict()
    del values["notes"], values["first_tokens"]
    values["settings"].pop("frugal", None)
    return values


# --- the same as locate --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_toy_tokenizer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_it_finds_what_locate_finds(family, dtype, tmp_path):
    name = saved(tmp_path, family, dtype=dtype)
    found, expected = melayer.locate_frugal(name, texts=TEXTS), whole(name)
    assert found.me_layer == 3
    # In half precision the massive token alone and among others may be rounded to the next number.
    close = {"rel": 1e-5, "abs": 1e-6} if dtype is torch.float32 else {"rel": 0.01, "abs": 0.01}
    assert_same(figures(found), figures(expected), **close)
    said = "Frugal: one block at a time was read from the checkpoint. Other first tokens were not looked at."
    assert found.notes == (*expected.notes, said)
    assert found.first_tokens is None
    assert found.settings["frugal"] == {"blocks_run": 8, "stop_early": False}
    off = np.linalg.norm(found.trace.states - expected.trace.states, axis=1)
    assert (off <= close["rel"] * np.linalg.norm(expected.trace.states, axis=1)).all()


@pytest.mark.usefixtures("_toy_tokenizer")
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gpt_oss", "qwen3_next"])
def test_without_planting_none_is_found(family, tmp_path):
    name = saved(tmp_path, family, writes=())
    found = melayer.locate_frugal(name, texts=TEXTS, stop_early=True)
    assert found.me_layer is None
    assert found.massive == ()
    assert found.complete
    assert_same(figures(found), figures(whole(name)))


@pytest.mark.usefixtures("_toy_tokenizer")
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_each_block_holds_the_weights_of_a_plain_load(family, tmp_path, monkeypatch):
    name = saved(tmp_path, family)
    truth, seen = dict(melayer.load(name).model.named_parameters()), {}
    drop = streaming.Stream._drop

    def look(self, group, output):
        prefix, block = self._blocks[group]
        seen.update({f"{prefix}.{key}": value.detach().clone() for key, value in block.named_parameters()})
        drop(self, group, output)
        assert all(p.device.type == "meta" for p in block.parameters())

    monkeypatch.setattr(streaming.Stream, "_drop", look)
    melayer.locate_frugal(name, texts=[CONTEXT])
    assert len({key.split(".")[2] for key in seen}) == toys.N_LAYERS
    assert all(torch.equal(truth[key], value) for key, value in seen.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_than_the_checkpoint_s(tmp_path, dtype):
    name = saved(tmp_path)
    loaded = melayer.load(name, dtype=dtype)
    expected = melayer.locate(loaded.model, loaded.tokenizer, texts=TEXTS, max_tokens=32, name=name)
    found = melayer.locate_frugal(name, texts=TEXTS, dtype=dtype)
    assert found.model == expected.model
    assert_same(figures(found), figures(expected), rel=0.01, abs=0.01)


def test_many_texts_read_the_file_more_than_once(tmp_path):
    name = saved(tmp_path)
    steps = []
    found = melayer.locate_frugal(
        name, texts=TEXTS, max_batch_tokens=40, progress=lambda done, total: steps.append((done, total))
    )
    assert_same(figures(found), figures(whole(name)))
    assert steps == [(done, 24) for done in range(1, 25)]


def test_states_that_take_too_much_are_made_again(tmp_path, monkeypatch):
    name = saved(tmp_path, writes=[(1, 7, 2000.0), (2, 7, -2000.0), (5, 7, 9000.0)])
    monkeypatch.setattr(frugal, "KEPT_BYTES", 0)
    monkeypatch.setattr(streaming.Stream, "block_bytes", 0)
    again = melayer.locate_frugal(name, texts=TEXTS)
    assert again.erased_at == (2,)
    assert_same(figures(again), figures(whole(name)))


def test_each_block_is_read_once(tmp_path, monkeypatch):
    read = []
    fill = shards._fill
    monkeypatch.setattr(shards, "_fill", lambda part, stream, place: (read.append(place), fill(part, stream, place)))
    name = saved(tmp_path)
    melayer.locate_frugal(name, texts=TEXTS)
    held = shards.open_shards(tmp_path).places
    assert sorted(read) == sorted(place for key, place in held.items() if ".layers." in key)


def test_checkpoints_may_hold_buffers(tmp_path, monkeypatch):
    """A buffer in a checkpoint outlives its block, and must not change with the memory that it was read into."""
    from transformers.models.llama import modeling_llama

    class Scaled(modeling_llama.LlamaDecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            self.register_buffer("offset", torch.full((64,), 0.5 + layer_idx))

        def forward(self, hidden_states, *args, **kwargs):
            assert self.offset.eq(100.0 + self.self_attn.layer_idx).all()
            return super().forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Scaled)
    model = toys.make("llama")
    for layer, block in enumerate(toys.blocks(model)):
        block.offset.fill_(100.0 + layer)
    toys.plant(model, [(3, 7, 3000.0)], context=CONTEXT)
    model.save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    # Two passes: in the second one each block meets what the first one left of it.
    assert melayer.locate_frugal(str(tmp_path), texts=TEXTS, max_batch_tokens=40).me_layer == 3


# --- stopping early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("persistence", "last"), [(0.0, 3), (0.25, 4), (0.5, 6), (0.625, 7)])
def test_it_stops_when_the_me_layer_is_certain(tmp_path, persistence, last):
    name = saved(tmp_path)
    criterion = melayer.Criterion(persistence=persistence)
    found = melayer.locate_frugal(name, texts=TEXTS, criterion=criterion, stop_early=True)
    expected = whole(name, criterion=criterion)
    assert found.me_layer == expected.me_layer == 3
    assert [row.layer for row in found.blocks] == list(range(last + 1))
    assert_same(figures(found)["blocks"], figures(expected)["blocks"][: last + 1])
    assert_same(figures(found)["stages"], figures(expected)["stages"], rel=1e-2)
    assert found.complete == (last == 7)
    assert found.to_dict()["erased_at"] == (None if last < 7 else [])
    if last < 7:
        assert f"nothing behind block {last} was run" in found.sentence
        assert any(note.startswith(f"Stopped after block {last}") for note in found.notes)
        assert found.model.fingerprint != expected.model.fingerprint
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_early_growth_does_not_stop_it(tmp_path):
    name = saved(tmp_path, writes=[(1, 7, 2000.0), (2, 7, -2000.0), (5, 7, 9000.0)])
    found = melayer.locate_frugal(name, texts=TEXTS, stop_early=True)
    assert found.me_layer == whole(name).me_layer == 5
    assert len(found.blocks) == 7
    assert found.erased_at == ()


def test_a_minority_does_not_stop_it(tmp_path):
    name = saved(tmp_path)
    texts = [CONTEXT, *(toys.text(20, x_at=None, seed=seed) for seed in (7, 8)), "X", "X w1"]
    found = melayer.locate_frugal(name, texts=texts, stop_early=True)
    assert found.me_layer is None
    assert found.complete


def test_to_stop_early_all_texts_run_together(tmp_path):
    name = saved(tmp_path)
    with pytest.raises(
        InputError, match="4 texts of up to 32 tokens take 128 places.* or --max-batch-tokens 128"
    ) as said:
        melayer.locate_frugal(name, texts=TEXTS, max_batch_tokens=40, stop_early=True)
    advice = int(str(said.value).rstrip(".").rpartition(" ")[2])
    assert melayer.locate_frugal(name, texts=TEXTS, max_batch_tokens=advice, stop_early=True).me_layer == 3


def test_a_stopped_result_is_shown(tmp_path):
    from rich.console import Console

    from melayer.measurements.locate.table import show_locate
    from melayer.studies.overview import write_report

    found = melayer.locate_frugal(saved(tmp_path / "m"), texts=TEXTS, stop_early=True)
    console = Console(record=True, width=120)
    show_locate(found, console)
    assert "nothing behind block 4 was run" in " ".join(console.export_text().split())
    assert "nothing behind block 4 was run" in write_report(found, tmp_path / "report").html.read_text()


# --- findings and refusals -----------------------------------------------------------------------------------------


def changed(directory, change):
    """The checkpoint with `change` applied to the tensors of the first shard that has a block 4."""
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors = load_file(file)
        if "model.layers.4.mlp.down_proj.weight" in tensors:
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(directory)


def test_nan_weights_are_a_finding(tmp_path):
    name = saved(tmp_path)

    def spoil(tensors):
        tensors["model.layers.4.mlp.down_proj.weight"][0, 0] = float("nan")

    changed(name, spoil)
    found = melayer.locate_frugal(name, texts=TEXTS)
    assert found.non_finite.layer == 4
    assert found.sentence.startswith("Non-finite activations in float32: the first (nan) is in the output of block 4")
    assert_same(figures(found), figures(whole(name)))


def test_a_tensor_that_is_missing(tmp_path):
    name = saved(tmp_path)
    index = tmp_path / files.INDEX
    key = "model.layers.4.mlp.down_proj.weight"
    changed(name, lambda tensors: tensors.pop(key))
    with pytest.raises(ModelError, match=f"places {key} in .* which does not hold it"):
        melayer.locate_frugal(name, texts=TEXTS)
    values = json.loads(index.read_text())
    del values["weight_map"][key]
    index.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=f"lacks 1 of the weights .*{key}"):
        melayer.locate_frugal(name, texts=TEXTS)


def test_a_shard_that_is_missing_or_cut_short(tmp_path):
    name = saved(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[2]
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(ModelError, match=f"{file.name} is damaged and cannot be read as safetensors"):
        melayer.locate_frugal(name, texts=TEXTS)
    file.unlink()
    with pytest.raises(ModelError, match=rf"1 of them are not there \(the first is {file.name}\)"):
        melayer.locate_frugal(name, texts=TEXTS)


def test_a_weight_of_another_shape(tmp_path):
    name = saved(tmp_path)
    changed(name, lambda tensors: tensors.update({"model.layers.4.mlp.down_proj.weight": torch.zeros(64, 95)}))
    with pytest.raises(ModelError, match="have other shapes than its config asks for .*down_proj.weight: .64, 95."):
        melayer.locate_frugal(name, texts=TEXTS)


def test_pickles_are_refused_and_the_advice_works(tmp_path):
    reference = toys.make("llama")
    name = saved(tmp_path, writes=())
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"are pickles \(pytorch_model.bin\).* Leave --frugal out and pass --allow-pickle"
    ):
        melayer.locate_frugal(name, texts=TEXTS)
    assert melayer.load(name, allow_pickle=True)


def test_adapters_and_quantised_weights_are_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    with pytest.raises(ModelError, match="holds an adapter, which is merged .* Leave --frugal out"):
        melayer.locate_frugal(str(tmp_path / "adapter"), texts=TEXTS)
    name = saved(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"is quantised \(bitsandbytes\), and such weights cannot be read block by block"
    ):
        melayer.locate_frugal(name, texts=TEXTS)


def test_weights_that_blocks_share_are_refused(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (4, 5))
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", {second: first})
    name = saved(tmp_path, "llama-tied", writes=())
    assert second not in shards.open_shards(tmp_path).places
    assert whole(name).me_layer is None
    with pytest.raises(ModelError, match="5.mlp.up_proj.weight is in no file .* shared with another block"):
        melayer.locate_frugal(name, texts=TEXTS)


def test_a_mask_saved_with_a_model_is_refused_and_the_advice_works(tmp_path):
    name = saved(tmp_path)
    melayer.WeMask(rate=0.5, selector="random", layers=[5]).save(tmp_path)
    with pytest.raises(ModelError, match=r"A mask was saved with .* Pass --no-mask \(mask=False\)"):
        melayer.locate_frugal(name, texts=TEXTS)
    assert melayer.locate_frugal(name, texts=TEXTS, mask=False).me_layer == 3


def test_bad_options_are_said(tmp_path):
    name = saved(tmp_path)
    with pytest.raises(InputError, match="max_listed is 0; expected at least 1"):
        melayer.locate_frugal(name, max_listed=0)
    with pytest.raises(InputError, match="300 tokens were asked for, but the model has 256 positions"):
        melayer.locate_frugal(name, texts=TEXTS, max_tokens=300)
    with pytest.raises(ModelError, match="Use --device auto, or cpu"):
        melayer.locate_frugal(name, texts=TEXTS, device="meta")


def test_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path / "cache"))
    toys.write_gguf(tmp_path / "toy.gguf")
    texts = ["hello there, this is a text"]
    name = str(tmp_path / "toy.gguf")
    assert_same(figures(melayer.locate_frugal(name, texts=texts)), figures(whole(name, texts=texts)))


@pytest.mark.demo
def test_the_demo_model(demo):
    found = melayer.locate_frugal("demo")
    expected = melayer.locate(demo.model, demo.tokenizer, max_tokens=32, name="demo")
    assert (found.me_layer, found.emergence, found.erased_at) == (11, "single", (28, 29))
    # Sums of 576 terms in another order: the massive token runs among others, and not alone.
    assert_same(figures(found), figures(expected), rel=1e-3, abs=1e-4)
    stopped = melayer.locate_frugal("demo", stop_early=True)
    assert (stopped.me_layer, len(stopped.blocks)) == (11, 19)


# --- the benchmark -------------------------------------------------------------------------------------------------


@pytest.fixture
def python():
    """The interpreter and an environment in which it imports the very package under test."""
    return sys.executable, {**os.environ, "PYTHONPATH": str(Path(melayer.__file__).parent.parent)}


def test_the_benchmark_runs_and_cleans_up(tmp_path, python):
    interpreter, environment = python
    command = [interpreter, BENCHMARK, "--shape", "tiny", "--repeats", "1", "--json", "--dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = json.loads(done.stdout)
    assert [row["contender"] for row in rows] == ["read", "frugal", "stop-early", "whole"]
    for row in rows:
        assert set(row) == {"contender", "length", "seconds", "peak_rss_bytes", "time_ratio", "memory_ratio"}
        assert row["seconds"] > 0
    assert rows[0]["time_ratio"] == 1
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_checks_the_answer(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("frugal_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    benchmark.write(tmp_path, benchmark.SHAPES["tiny"])
    assert benchmark.child("frugal", tmp_path, 16)["seconds"] > 0
    # Another checkpoint than it takes it for.
    file = tmp_path / "model-00004-of-00010.safetensors"
    block = load_file(file)
    block["model.layers.2.mlp.down_proj.weight"].zero_()
    save_file(block, file, metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="No massive activation was found"):
        benchmark.child("frugal", tmp_path, 16)
