import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import children
import toys
from melayer.errors import MelayerWarning, ModelError
from melayer.loading import gguf
from melayer.runs import cache


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    toys.write_gguf(path)
    return path


@pytest.fixture(scope="module")
def whole_entry(gguf_file, tmp_path_factory):
    return gguf.convert(gguf_file, cache=tmp_path_factory.mktemp("cache"))


def entries(cache):
    return sorted(path.name for path in (cache / "gguf").iterdir() if not path.name.endswith(".lock"))


def test_the_conversion_is_the_model(gguf_file, whole_entry):
    direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(whole_entry)
    ids = torch.tensor([[3, 40, 7, 100]])
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, converted(ids).logits)
    assert not hasattr(converted.config, "quantization_config")
    assert gguf.source_sha256(whole_entry) == cache.sha256_of(gguf_file)


def test_the_tokenizer_survives(whole_entry):
    tokenizer = AutoTokenizer.from_pretrained(whole_entry)
    assert tokenizer("<|im_start|>he")["input_ids"] == [1, tokenizer.convert_tokens_to_ids("he")]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_a_whole_entry_is_read_and_not_written_again(gguf_file, whole_entry):
    before = {file.name: file.stat().st_mtime_ns for file in whole_entry.iterdir()}
    assert gguf.convert(gguf_file, cache=whole_entry.parent.parent) == whole_entry
    assert {file.name: file.stat().st_mtime_ns for file in whole_entry.iterdir()} == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_entry_is_made_again(gguf_file, tmp_path, damage):
    entry = gguf.convert(gguf_file, cache=tmp_path)
    weights = entry / "model.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-100])
    elif damage == "remove":
        weights.unlink()
    else:
        (entry / gguf.MANIFEST).write_text("{")
    assert not gguf.is_whole(entry)
    assert gguf.convert(gguf_file, cache=tmp_path) == entry
    assert weights.read_bytes() == content


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_others_put_in_its_place_stays(gguf_file, tmp_path, kind):
    entry = gguf.convert(gguf_file, cache=tmp_path / "other").name
    place, theirs = tmp_path / "gguf" / entry, tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "note").write_text("mine")
    place.parent.mkdir()
    theirs.rename(place) if kind == "directory" else place.symlink_to(theirs)
    with pytest.raises(ModelError, match="was not written by melayer, so it is left as it is. Move it away"):
        gguf.convert(gguf_file, cache=tmp_path)
    assert (place / "note").read_text() == "mine"


def converting(file, cache, at_once, told):
    """Run in processes of their own; each says when it writes."""
    write = gguf._write_entry

    def telling(*arguments):
        told.put("writes")
        write(*arguments)

    gguf._write_entry = telling
    at_once.wait(children.PATIENCE)
    told.put(gguf.convert(file, cache=cache).name)


def test_two_processes_at_once_convert_once(gguf_file, tmp_path):
    # The second must wait for the first and then read.
    at_once, told = children.SERVER.Barrier(2), children.SERVER.Queue()
    both = [children.started(converting, gguf_file, tmp_path, at_once, told) for _ in range(2)]
    said = [told.get(timeout=children.PATIENCE) for _ in range(3)]
    assert [children.ended(process) for process in both] == [0, 0]
    assert told.empty()
    assert entries(tmp_path) == said[1:2] == said[2:]
    assert said[0] == "writes"


def converted_and_killed(file, cache):
    os.fsync = lambda fd: children.kill()
    gguf.convert(file, cache=cache)


def test_a_kill_in_the_middle_leaves_nothing_that_is_used(gguf_file, tmp_path):
    assert children.ended(children.started(converted_and_killed, gguf_file, tmp_path)) == -signal.SIGKILL
    (left,) = entries(tmp_path)
    assert left.endswith(".tmp")  # everything was written, but not yet renamed
    entry = gguf.convert(gguf_file, cache=tmp_path)
    assert entries(tmp_path) == [entry.name]
    assert gguf.is_whole(entry)


def test_a_full_disk_is_said_and_leaves_nothing(gguf_file, tmp_path, room):
    room(gguf_file.stat().st_size // 2)
    with pytest.raises(
        ModelError,
        match="could not be written to the cache.*"
        "Free some space or name another directory in the environment variable MELAYER_CACHE",
    ):
        gguf.convert(gguf_file, cache=tmp_path)
    room(None)
    assert entries(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_said(gguf_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="could not be written to the cache"):
        gguf.convert(gguf_file, cache=tmp_path / "file")


def test_damaged_files_are_said(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    bad = tmp_path / "bad.gguf"
    for damaged, message in [
        (b"PK\x03\x04" + content, "is not a GGUF file: it starts with"),
        (b"", "is not a GGUF file"),
        (content[:-50], "is cut off: its header lists tensors up to byte"),
        (content[:300], "is damaged: its header or its tensors cannot be read"),
        (content[:4] + (9).to_bytes(4, "little") + content[8:], "GGUF version 9, expected 2 or 3"),
    ]:
        bad.write_bytes(damaged)
        with pytest.raises(ModelError, match=message):
            gguf.convert(bad, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_cache_directory_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path))
    assert cache.cache_directory() == tmp_path
    monkeypatch.delenv("MELAYER_CACHE")
    assert cache.cache_directory().name == "melayer"


def test_a_lost_digit_split_is_mended(tmp_path):
    path = tmp_path / "smol.gguf"
    toys.write_gguf(path, pre="smollm")
    entry = gguf.convert(path, cache=tmp_path)
    split = AutoTokenizer.from_pretrained(entry).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("a 123\n\n1.")] == ["a", "Ġ", "1", "2", "3", "ĊĊ", "1", "."]


def test_an_unknown_split_is_said_aloud(tmp_path):
    path = tmp_path / "odd.gguf"
    toys.write_gguf(path, pre="of-tomorrow")
    with pytest.warns(MelayerWarning, match="names the pre-tokenizer 'of-tomorrow', which transformers replaces"):
        gguf.convert(path, cache=tmp_path)


@pytest.mark.demo
def test_ids_of_the_demo_are_those_of_the_original(demo):
    ids = demo.tokenizer
    assert len(ids("12345")["input_ids"]) == 5
    assert ids.convert_ids_to_tokens(ids("cats\n\n1. hi")["input_ids"]) == ["cats", "ĊĊ", "1", ".", "Ġhi"]
    assert ids("<|im_start|>")["input_ids"] == [1]
    assert "You are a helpful AI assistant named SmolLM" in ids.chat_template
    manifest = json.loads(
        (cache.cache_directory() / "gguf").joinpath(Path(demo.model.name_or_path).name, gguf.MANIFEST).read_text()
    )
    assert manifest["source"].endswith(".gguf")


def test_two_loads_are_the_same_to_the_bit(gguf_file, tmp_path):
    first, second = (gguf.convert(gguf_file, cache=tmp_path / name) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": range(2), "split": (0, 2)}, "is one of the 2 parts of a model.* Give the model as one file"),
        ({"blocks": range(3)}, r"lacks 9 of the weights that its model needs \(the first is model.layers.3"),
        ({"leave_out": ("output_norm.weight",)}, "lacks 1 of the weights .*model.norm.weight"),
        ({"leave_out": ("token_embd.weight",)}, "lacks .*embed_tokens.weight"),
        ({"n_blocks": 10**7}, "says that the model has 10,000,000 blocks, and holds 39 tensors"),
    ],
)
def test_what_is_not_the_whole_model_is_refused_and_not_kept(options, message, tmp_path):
    path = tmp_path / "part.gguf"
    toys.write_gguf(path, **options)
    for _ in range(2):
        with pytest.raises(ModelError, match=message):
            gguf.convert(path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or entries(tmp_path / "cache") == []


def test_a_head_that_is_the_embedding_is_not_missing(tmp_path):
    path = tmp_path / "tied.gguf"
    toys.write_gguf(path, leave_out=("output.weight",))
    model = AutoModelForCausalLM.from_pretrained(gguf.convert(path, cache=tmp_path / "cache"))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["whole-00001-of-00001.gguf", "not-a-part-of-00002.gguf"])
def test_one_part_of_one_is_the_whole(name, tmp_path):
    toys.write_gguf(tmp_path / name, split=(0, 1))
    assert gguf.is_whole(gguf.convert(tmp_path / name, cache=tmp_path / "cache"))


def test_entries_of_an_older_conversion_are_not_read(gguf_file, tmp_path):
    """One that lacked weights was completed with random numbers, and kept."""
    entry = gguf.convert(gguf_file, cache=tmp_path)
    content = (entry / "model.safetensors").read_bytes()
    manifest = json.loads((entry / gguf.MANIFEST).read_text())
    for changes in ({"format": 1}, {"files": {}}, {"source_sha256": "0" * 64}, {"files": {"config.json": 3}}):
        (entry / gguf.MANIFEST).write_text(json.dumps(manifest | changes))
        (entry / "model.safetensors").write_bytes(b"other")
        assert not gguf.is_whole(entry)
        assert gguf.convert(gguf_file, cache=tmp_path) == entry
        assert (entry / "model.safetensors").read_bytes() == content


def test_what_lies_beside_a_gguf_file_is_not_read(gguf_file, tmp_path):
    """transformers would load the base of an adapter, the tokenizer's class, and settings of generation from there."""
    path = tmp_path / "m" / "tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(gguf_file.read_bytes())
    toys.make("llama").save_pretrained(tmp_path / "other")
    beside = {
        "adapter_config.json": {"base_model_name_or_path": str(tmp_path / "other"), "peft_type": "LORA"},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "chat_template": "mine"},
        "generation_config.json": {"max_length": 7},
    }
    for name, values in beside.items():
        (path.parent / name).write_text(json.dumps(values))
    entry = gguf.convert(path, cache=tmp_path / "cache")
    alone = gguf.convert(gguf_file, cache=tmp_path / "alone")
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == {
        file.name: file.read_bytes() for file in alone.iterdir()
    }


def test_what_was_said_of_a_conversion_is_said_each_time(tmp_path):
    path = tmp_path / "odd.gguf"
    toys.write_gguf(path, pre="of-tomorrow")
    for _ in range(2):
        with pytest.warns(MelayerWarning, match="names the pre-tokenizer 'of-tomorrow'"):
            gguf.convert(path, cache=tmp_path / "cache")
