"""`melayer quant-check` as a person types it."""

import json

import pytest

import melayer
import toys
from command import defaults, failing, run
from melayer import cli
from melayer.interventions.baked_prefix import BakedPrefix
from melayer.measurements.criterion import Criterion
from melayer.model import wiring
from melayer.model.provenance import fingerprint
from melayer.quantisation.calibration import ScaleSet, read_scales
from melayer.quantisation.linear_inputs import find_linear_inputs


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(toys.text(40, x_at=None, seed=seed) for seed in range(8)))
    return path


FEW = (
    "--prefix",
    "X",
    "-T",
    "16",
    "--n-sequences",
    "4",
    "--formats",
    "int8",
    "--granularities",
    "per-tensor,per-token",
)


def test_options_have_the_names_and_defaults_of_the_function():
    options = defaults(cli.quant_check_command)
    assert vars(Criterion()).items() <= options.items()
    function = defaults(melayer.quant_check)
    # Lists are text on the command line, and texts are files.
    elsewhere = {"model", "tokenizer", "texts", "criterion", "parts", "name", "progress", "mask", "resume"}
    for name in function.keys() - elsewhere - {"formats", "granularities", "treatments"}:
        assert options[name] == function[name], name
    for name in ("formats", "granularities"):
        assert options[name].split(",") == list(function[name])
    assert options["treatments"] is function["treatments"] is None


def test_it_prints_and_writes(toy_directory, texts, tmp_path):
    out = tmp_path / "out"
    done = run("quant-check", toy_directory, "--file", texts, *FEW, "--out", out)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "Unquantised the perplexity is" in said
    assert "What baking and the mask change" in said
    assert "Worst linear inputs" in said
    assert "Open " in said
    assert sorted(path.name for path in out.iterdir()) == [
        "baked", "baked+mask", "quant-check.jsonl", "report.html", "report.json", "scales.json", "scales.safetensors",
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["quant_check"]["me_layer"] == 3
    loaded = melayer.load(str(toy_directory))
    decoder = wiring.read(loaded.model)
    steps = read_scales(
        out, find_linear_inputs(decoder).inputs, ScaleSet("baked", "int8", "per-tensor"), fingerprint(loaded.model)
    )
    assert len(steps) == len(report["quant_check"]["inputs"])
    assert BakedPrefix.load(out / "baked", loaded.model).ids == (toys.X,)


def test_it_goes_on_from_what_was_kept(toy_directory, texts, tmp_path):
    out = tmp_path / "out"
    arguments = ("quant-check", toy_directory, "--file", texts, *FEW, "--json", "--out", out)
    whole = run(*arguments)
    lines = (out / "quant-check.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 4
    (out / "quant-check.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    again = run(*arguments)
    assert again.stdout == whole.stdout
    assert len((out / "quant-check.jsonl").read_text().splitlines()) == 1 + 2 * 4
    said = failing(*arguments, "-T", "12")
    assert "quant-check.jsonl is of another quant-check: calibration, sequences differ" in said


def test_json_is_to_dict_and_nothing_else(toy_directory, texts):
    done = run("quant-check", toy_directory, "--file", texts, *FEW, "--json")
    assert done.exit_code == 0, done.output
    loaded = melayer.load(str(toy_directory))
    result = melayer.quant_check(
        loaded.model,
        loaded.tokenizer,
        texts=texts.read_text().splitlines(),
        prefix=[toys.X],
        T=16,
        n_sequences=4,
        formats=["int8"],
        granularities=["per-tensor", "per-token"],
        name=str(toy_directory),
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_dict()))


def test_the_mask_has_options(toy_directory, texts):
    options = ("--mask-rate", "1", "--selector", "random", "--layers", "5-", "--treatments", "plain,mask")
    done = run("quant-check", toy_directory, "--file", texts, *FEW, *options, "--json")
    assert done.exit_code == 0, done.output
    mask = json.loads(done.stdout)["settings"]["mask"]
    assert (mask["rate"], mask["selector"], mask["layers"]) == (1, "random", [5, 6, 7])


def test_calibration_texts_are_a_file(toy_directory, texts, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("\n".join(toys.text(40, x_at=None, seed=seed) for seed in range(30, 38)))
    done = run("quant-check", toy_directory, "--file", texts, "--calibration", held, *FEW, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["calibration"] == "given"
    said = failing("quant-check", toy_directory, "--file", texts, "--calibration", texts, *FEW)
    assert "is among those to calibrate with" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--formats", "int9"], "There is no format 'int9'"),
        (["--granularities", "tensor"], "Did you mean 'per-tensor'?"),
        (["--treatments", "bake"], "There is no treatment 'bake'"),
        (["--mask-rate", "2"], "rate"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--prefix", " "], "gives no tokens"),
        (["-T", "1000"], "positions"),
    ],
)
def test_bad_input_writes_nothing(toy_directory, texts, tmp_path, options, said):
    out = tmp_path / "out"
    assert said in failing("quant-check", toy_directory, "--file", texts, *FEW, *options, "--out", out)
    assert not out.exists() or not list(out.iterdir())


def test_help_has_an_example():
    done = run("quant-check", "--help")
    assert "melayer quant-check demo --formats int8 --out demo-quant" in " ".join(done.stdout.replace("│", " ").split())
