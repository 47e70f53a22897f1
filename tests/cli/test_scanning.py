"""`melayer scan` as a person types it."""

import gc
import json
import resource
import tracemalloc
from pathlib import Path

import pytest
import torch

import melayer
import toys
from command import defaults, failing, run
from melayer import cli
from melayer.census.scan import scan
from melayer.data.corpus import Corpus
from melayer.measurements.criterion import Criterion


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"text": toys.text(12, x_at=i % 3, seed=i), "kind": "ab"[i % 2]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_options_have_the_names_and_defaults_of_the_function():
    options = defaults(cli.scanning.scan_command)
    assert vars(Criterion()).items() <= options.items()
    function = defaults(scan)
    # Lists are text on the command line; the mask has options of its own; the store is --out.
    elsewhere = {
        "model",
        "tokenizer",
        "data",
        "sites",
        "formats",
        "mask",
        "store",
        "criterion",
        "parts",
        "name",
        "progress",
    }
    for name in function.keys() - elsewhere:
        assert options[name] == function[name], name
    for name, value in defaults(Corpus).items():
        if name != "source":
            assert options[name] == value, name
    load = defaults(melayer.load)
    for name in load.keys() - {"name"}:
        assert options[name] == load[name], name
    mask = melayer.WeMask(me_layer=0)
    for name in ("selector", "strength", "seed", "layers"):
        assert options[name] == getattr(mask, name), name


def test_it_prints_and_writes(toy_directory, corpus, tmp_path):
    out = tmp_path / "out"
    done = run(
        "scan", toy_directory, "--data", corpus, "--formats", "int8", "--mask-rate", "0.5", "--layers", "4-",
        "--category", "kind", "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Over 8 documents (96 tokens) the largest activation is |x| =" in done.stdout
    assert "Category a: 4 documents, 4 sequences, 48 tokens" in done.stdout
    said = " ".join(done.stdout.split())  # a title is as wide as its table
    assert "8 massive tokens: 3 first in their sequence, 0 later delimiters, 5 others" in said
    assert "Relative error of ordinary tokens" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "scan.0.state"]
    report = json.loads((out / "report.json").read_text())
    assert report["scan"]["total"]["me_layer"] == 3
    assert report["scan"]["settings"]["data"]["category"] == "kind"


def test_json_is_to_dict_and_nothing_else(toy_directory, corpus):
    done = run("scan", toy_directory, "--data", corpus, "--sites", "block_out,k", "--json")
    loaded = melayer.load(str(toy_directory))
    result = scan(
        loaded.model, loaded.tokenizer, Corpus(str(corpus)), sites=["block_out", "k"], name=str(toy_directory)
    )
    found, expected = json.loads(done.stdout), json.loads(json.dumps(result.to_dict()))
    found.pop("seconds"), expected.pop("seconds")
    assert found == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sites", "blocks"], "The site 'blocks' is not known"),
        (["--formats", "int3"], "The format 'int3' is not known"),
        (["--mask-rate", "0.5"], "A mask was given, but no format"),
        (["--mask-rate", "1.5", "--formats", "int8"], "rate is 1.5"),
        (["--column", "words"], "has the columns text, kind, not 'words'"),
        (["--category", "topic"], "has the columns text, kind, not 'topic'"),
        (["--max-memory", "lots", "--device-map", "auto"], "--max-memory 'lots' was given; expected e.g. 0=20GiB"),
        (["--max-memory", "cpu=1GiB"], "max_memory and offload_folder go with a device map"),
    ],
)
def test_bad_options_are_one_sentence(toy_directory, corpus, options, said):
    assert said in failing("scan", toy_directory, "--data", corpus, *options)


def test_bad_options_are_found_before_the_model_is_loaded(corpus):
    for options in (["--sites", "x"], ["--formats", "x"], ["--column", "x"], ["--mask-rate", "2", "--formats", "int8"]):
        assert "'missing'" not in failing("scan", "missing", "--data", corpus, *options)


def test_there_must_be_something_to_read(toy_directory, tmp_path):
    assert "There is no corpus" in failing("scan", toy_directory, "--data", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no document" in failing("scan", toy_directory, "--data", tmp_path / "empty.txt")


def test_a_model_spread_by_a_device_map_gives_the_same(toy_directory, corpus, tmp_path):
    plain = json.loads(run("scan", toy_directory, "--data", corpus, "--json").stdout)
    done = run(
        "scan", toy_directory, "--data", corpus, "--json", "--device-map", "auto", "--max-memory", "cpu=100KiB",
        "--offload-folder", tmp_path / "weights",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    spread = json.loads(done.stdout)
    assert [row["max_abs"] for row in spread["total"]["places"]] == [row["max_abs"] for row in plain["total"]["places"]]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """What is alive after the second half of the documents is what was alive after the first."""
    path, half = tmp_path / "corpus.txt", 600
    path.write_text("\n".join(toys.text(5 + i % 20, x_at=0 if i % 4 == 0 else None, seed=i) for i in range(2 * half)))
    model, tokenizer, seen = toys.make("llama"), toys.tokenizer(), []

    def look(done, total, note):
        if done >= half * (len(seen) + 1):
            gc.collect()
            alive = gc.get_objects()
            tensors = sum(found.nbytes for found in alive if isinstance(found, torch.Tensor))
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            seen.append((tensors, len(alive), tracemalloc.get_traced_memory()[0], resident))

    for _ in range(2):  # what Python fetches once, for the first write and the first time one is replaced, is there
        scan(model, tokenizer, str(path), limit=4, store=tmp_path / "first")
    tracemalloc.start()
    try:
        scan(model, tokenizer, str(path), max_batch_tokens=512, store=tmp_path, checkpoint_seconds=0, progress=look)
    finally:
        tracemalloc.stop()
    (tensors, objects, traced, resident), last = seen
    assert last[0] == tensors > 0
    # Less than a number of Python's and its place in a list for each document.
    assert last[1] - objects < half / 10
    assert last[2] - traced < 32 * half
    # What no object of Python's holds: much less than the output of the blocks, had it been kept.
    assert last[3] - resident < half * 14 * 8 * toys.D_MODEL * 4
