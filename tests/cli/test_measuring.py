"""The command as a person types it: what it prints, where, and with which exit code."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, MambaConfig

import melayer
import toys
from command import TEXT, defaults, failing, run
from melayer import cli
from melayer.cli.parsing import rates_of
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion


def test_locate_prints_the_answer(toy_directory):
    done = run("locate", toy_directory, "--text", TEXT)
    assert done.exit_code == 0, done.output
    assert "The ME layer is block 3 of 8 (0-based): there token 4 (“X”) reaches |h| =" in done.stdout
    assert "<- ME layer" in done.stdout
    assert "Emergence: single" in done.stdout


def test_json_is_to_dict_and_nothing_else(toy_directory):
    done = run("locate", toy_directory, "--text", TEXT, "--text", "w1 w2", "--json")
    loaded = melayer.load(str(toy_directory))
    result = melayer.locate(loaded.model, loaded.tokenizer, texts=[TEXT, "w1 w2"], name=str(toy_directory))
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_dict()))


def test_frugal_prints_what_the_function_finds(toy_directory):
    done = run("locate", toy_directory, "--text", TEXT, "--frugal", "--json")
    assert done.exit_code == 0, done.output
    result = melayer.locate_frugal(str(toy_directory), texts=[TEXT])
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_dict()))
    stopped = run("locate", toy_directory, "--text", TEXT, "--frugal", "--stop-early")
    assert stopped.exit_code == 0, stopped.output
    assert "nothing behind block 4 was run" in " ".join(stopped.stdout.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop-early"], "which stops the reading of blocks one by one. Add --frugal."),
        (["--frugal", "--offload-folder", "x"], "--offload-folder does not go with --frugal. Leave one of them out."),
        (["--frugal", "--device-map", "auto"], "--device-map does not go with --frugal. Leave one of them out."),
        (["--frugal", "--allow-pickle"], "--allow-pickle does not go with --frugal."),
        (["--frugal", "--base", "demo"], "--base does not go with --frugal."),
    ],
)
def test_what_does_not_go_with_frugal_is_said(toy_directory, options, message):
    done = run("locate", toy_directory, *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_options_have_the_names_and_defaults_of_the_function():
    for command in ("locate", "explain", "rigidity", "sinks", "sweep", "report"):
        options = defaults(getattr(cli.measuring, f"{command}_command"))
        assert vars(Criterion()).items() <= options.items()
        load = defaults(melayer.load)
        for name in ("dtype", "device", "device_map", "allow_pickle", "trust_remote_code", "revision", "mask"):
            assert options[name] == load[name]
        if command == "report":
            continue
        function = defaults(getattr(melayer, command))
        elsewhere = {"model", "tokenizer", "texts", "parts", "name", "criterion", "progress", "located"}
        elsewhere |= {"resume"}  # --out
        if command == "sweep":
            elsewhere |= {"rates", "selectors", "layers"}  # text: the next test reads their defaults
        for name in function.keys() - elsewhere:
            assert options[name] == function[name], (command, name)
    report, locate = defaults(cli.measuring.report_command), defaults(cli.measuring.locate_command)
    frugal, streamed = defaults(melayer.locate_frugal), {"frugal", "stop_early"}
    assert {name: report[name] for name in locate.keys() - streamed} == {n: locate[n] for n in locate.keys() - streamed}
    for name in frugal.keys() - {"name", "texts", "parts", "criterion", "progress"}:
        assert locate[name] == frugal[name], name


def test_the_default_grid_is_that_of_the_function():
    function, options = defaults(melayer.sweep), defaults(cli.measuring.sweep_command)
    assert rates_of(options["rates"]) == list(function["rates"])
    assert tuple(options["selectors"].split(",")) == function["selectors"]
    assert options["layers"] is function["layers"] is None


MEASUREMENTS = {
    "explain": (["--layers", "2-3,5", "--seeds", 2], {"layers": [2, 3, 5], "seeds": 2}),
    "rigidity": (["--n-first-tokens", 9, "--seed", 3], {"n_first_tokens": 9, "seed": 3}),
    "sinks": (["-T", 16, "--epsilon", 0.1], {"T": 16, "epsilon": 0.1}),
}


@pytest.mark.parametrize("command", MEASUREMENTS)
def test_each_measurement_prints_its_answer_and_its_json(command, toy_directory):
    arguments, options = MEASUREMENTS[command]
    texts = [TEXT, toys.text(20, x_at=0)]
    given = [command, toy_directory, "--text", texts[0], "--text", texts[1], *arguments]
    loaded = melayer.load(str(toy_directory))
    result = getattr(melayer, command)(loaded.model, loaded.tokenizer, texts=texts, name=str(toy_directory), **options)
    done = run(*given, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_dict()))
    shown = run(*given)
    assert result.sentence in " ".join(shown.stdout.split())
    assert "0-based" in shown.stdout


def test_files_limits_and_bos(toy_directory, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(toys.text(12, x_at=4, seed=s) for s in range(5)))
    values = json.loads(run("locate", toy_directory, "--file", file, "--limit", 3, "--bos", "--json").stdout)
    assert values["settings"]["n_sequences"] == 3
    assert values["settings"]["bos"] == {"asked": True, "sequences_with_bos": 3}
    whole = json.loads(run("locate", toy_directory, "--file", file, "--whole-file", "--json").stdout)
    assert whole["settings"]["n_sequences"] == 1
    builtin = json.loads(run("locate", toy_directory, "--limit", 2, "--json").stdout)
    assert builtin["settings"]["n_sequences"] == 2


def test_without_an_me_layer_the_exit_code_is_0(toy_directory):
    done = run("locate", toy_directory, "--text", toys.text(20, x_at=None))
    assert done.exit_code == 0
    assert "No massive activation was found" in done.stdout


def test_bad_input(toy_directory, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    cases = {
        "There is no model": ("locate", "./nowhere"),
        "holds no config.json": ("locate", tmp_path),
        "Text 0 is empty": ("locate", toy_directory, "--text", " "),
        "is empty. Give one with text": ("locate", toy_directory, "--file", tmp_path / "empty.txt"),
        "is no text in UTF-8": ("locate", toy_directory, "--file", latin),
        "300 tokens were asked for, but the model has 256 positions": (
            "locate", toy_directory, "--max-tokens", 300,
        ),
        "--whole-file says how to read a file, but no --file": ("locate", toy_directory, "--whole-file"),
        "expected NAME=PATH, for example ffn=feed_forward": ("locate", toy_directory, "--part", "ffn"),
        "There is no part 'mlp' to name": ("locate", toy_directory, "--part", "mlp=mlp", "--text", TEXT),
        "majority is 2.0; expected a share": ("locate", toy_directory, "--majority", 2),
        "cannot be used here": ("locate", toy_directory, "--device", "cuda:9"),
        "The length T is 1; expected at least 2": ("sinks", toy_directory, "-T", 1),
        "No text has T = 64 tokens; the longest has 20": ("sinks", toy_directory, "--text", TEXT),
        "No text has T = 64 tokens; the longest has 1.": ("sinks", toy_directory, "--text", "w1"),
        "Sequences of T = 300 tokens were asked for, but the model has 256 positions": (
            "sinks", toy_directory, "-T", 300,
        ),
        "epsilon is 2.0; expected a share of attention": ("sinks", toy_directory, "--epsilon", 2),
        "Layer 8 was asked for, but the model has blocks 0 to 7": ("explain", toy_directory, "--layers", "2,8"),
        "--layers 'x' was given; expected blocks counted from 0": ("explain", toy_directory, "--layers", "x"),
        "rate is 2.0; expected a share": ("generate", "./nowhere", "--prompt", "a", "--mask-rate", 2),
        "selector is 'best'; expected one of": ("generate", "./nowhere", "--prompt", "a", "--selector", "best"),
        "There is no prompt, or an empty one": ("generate", toy_directory, "--prompt", " ", "--layers", "4"),
        "but the model has 256 positions. Give a shorter prompt": (
            "generate", toy_directory, "--prompt", "w1", "--layers", "4", "--selector", "random",
            "--max-new-tokens", 256,
        ),
        "This tokenizer has no chat template": (
            "generate", toy_directory, "--prompt", "w1", "--layers", "4", "--selector", "random", "--chat",
        ),
        "Layer 9 was asked for": ("generate", toy_directory, "--prompt", "w1", "--layers", "9-"),
        "locate found no ME layer": ("generate", toy_directory, "--prompt", "w1", "--text", toys.text(9, x_at=None)),
        "selector is 'best'; expected one of weight": ("sweep", "./nowhere", "--selectors", "best"),
        "rate is 1.5; expected a share": ("sweep", "./nowhere", "--rates", "0,1.5"),
        "'x' is not a number. Give e.g. 0,0.5,1": ("sweep", "./nowhere", "--rates", "0,x"),
        "stands behind two rates and before the last one": ("sweep", "./nowhere", "--rates", "0,...,1"),
        "steps of 0.3 do not lead to 1": ("sweep", "./nowhere", "--rates", "0,0.3,...,1"),
        "There are no rates to sweep over": ("sweep", "./nowhere", "--rates", ","),
        "so there is nothing to sweep": (
            "sweep", toy_directory, "--text", toys.text(20, x_at=None), "-T", 16,
        ),
        "--layers '5-3' goes from 5 down to 3": ("explain", toy_directory, "--layers", "5-3"),
        "n_first_tokens is 1; expected at least 2": ("rigidity", toy_directory, "--n-first-tokens", 1),
        "A fixed first token is compared over texts, and there is only one": (
            "rigidity", toy_directory, "--text", TEXT, "--fixed-first-token",
        ),
        "No text has T = 40 tokens": ("report", toy_directory, "--out", tmp_path / "no", "-T", 40, "--text", TEXT),
        "The report cannot be written to": ("report", toy_directory, "--out", "/proc/melayer"),
    }  # fmt: skip
    for message, arguments in cases.items():
        assert message in failing(*arguments), message
    assert not list((tmp_path / "no").iterdir())


def test_a_model_without_softmax_attention(tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=4, intermediate_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    assert "has softmax attention, so there are no attention sinks" in failing("sinks", tmp_path, "-T", 16)


def test_one_token_is_said_to_be_no_measurement(toy_directory):
    for command, *more in (("locate",), ("explain",), ("rigidity", "--n-first-tokens", 9)):
        done = run(command, toy_directory, "--text", "w1", *more)
        assert done.exit_code == 0, done.output
        assert {
            "locate": "The criterion is not meaningful here",
            "explain": "There is no ME layer, so there is nothing to explain",
            "rigidity": "Too short for an effective rank",
        }[command] in " ".join(done.stdout.split())


def test_an_encoder_only_model(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    assert "is not a causal decoder" in failing("locate", tmp_path, "--text", TEXT)


def test_nan_weights_are_a_finding_and_not_a_crash(tmp_path):
    model = toys.make("llama")
    with torch.no_grad():
        toys.blocks(model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    done = run("locate", tmp_path, "--text", TEXT)
    assert done.exit_code == 0
    assert "Non-finite activations in float32: the first (nan) is in the output of block 2" in done.stdout
    out = tmp_path / "out"
    assert run("report", tmp_path, "--text", TEXT, "--out", out).exit_code == 0
    assert json.loads((out / "report.json").read_text())["locate"]["blocks"][2]["max_abs"] is None


def test_generate_shows_both_answers(toy_directory):
    given = ["generate", toy_directory, "--prompt", "X w4 w5 w6", "--selector", "random", "--layers", "4-"]
    given += ["--max-new-tokens", 5]
    done = run(*given, "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    (answer,) = values["answers"]
    assert values["mask"]["layers"] == [4, 5, 6, 7]
    assert len(answer["plain"].split()) <= 5
    shown = run(*given)
    assert shown.exit_code == 0, shown.output
    assert answer["plain"] in " ".join(shown.stdout.split())
    assert "Mask: random 0.5, strength 1, blocks: 4-7 (0-based)" in " ".join(shown.stdout.split())


def test_generate_locates_where_no_layers_are_given(toy_directory):
    done = run(
        "generate", toy_directory, "--prompt", "X w4 w5 w6", "--text", TEXT, "--selector", "random", "--mask-rate", 0,
        "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["mask"]["me_layer"] == 3
    assert values["mask"]["made_for"]["fingerprint"] == values["model"]["fingerprint"]
    assert values["answers"][0]["first_difference"] is None


def test_a_sweep_is_written_and_goes_on(toy_directory, tmp_path):
    given = ["sweep", toy_directory, "--text", toys.text(40, x_at=0), "-T", 20, "--selectors", "random"]
    given += ["--out", tmp_path]
    done = run(*given, "--rates", "0,0.5", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert [(p["selector"], p["rate"]) for p in (values["plain"], *values["masked"])] == [(None, 0), ("random", 0.5)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sweep"] == values
    kept = (tmp_path / "sweep.jsonl").read_text()
    more = run(*given, "--rates", "0,0.25,...,1")
    assert more.exit_code == 0, more.output
    assert (tmp_path / "sweep.jsonl").read_text().startswith(kept)
    assert len((tmp_path / "sweep.jsonl").read_text().splitlines()) == 1 + 5
    assert "random 0.75" in " ".join(more.stdout.split())
    other = run(*given, "--rates", "0,0.5", "--seed", 1)
    assert other.exit_code == 2
    assert "is of another sweep: seed differs" in " ".join(other.stderr.split())


def test_a_mask_saved_with_a_model_is_applied_and_said(toy_directory, tmp_path):
    directory = tmp_path / "masked"
    shutil.copytree(toy_directory, directory)
    WeMask(rate=0.5, selector="random", layers=[5]).save(directory)
    done = run("sinks", directory, "--text", TEXT, "-T", 16, "--json")
    assert done.exit_code == 0, done.output
    assert f"Note: The mask saved with {directory} is applied (random 0.5" in " ".join(done.stderr.split())
    without = run("sinks", directory, "--text", TEXT, "-T", 16, "--json", "--no-mask")
    assert without.stderr == ""
    masked, plain = (json.loads(result.stdout)["alpha"] for result in (done, without))
    assert masked[:5] == plain[:5]
    assert masked[5] != plain[5]


def test_debug_shows_the_trace():
    done = run("locate", "./nowhere", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "ModelError" in done.stderr


def test_a_note_is_a_line_on_stderr(tmp_path):
    path = tmp_path / "odd.gguf"
    toys.write_gguf(path, pre="of-tomorrow")
    done = run("locate", path, "--text", "hello there, this is a text", MELAYER_CACHE=str(tmp_path / "cache"))
    assert done.exit_code == 0, done.output
    assert "Note: The GGUF file names the pre-tokenizer 'of-tomorrow'" in " ".join(done.stderr.split())


def test_help_and_version():
    assert run("--version").stdout.strip() == melayer.__version__
    for command in ("locate", "explain", "rigidity", "sinks", "sweep", "report", "generate", "eval", "compare"):
        assert f"Example: melayer {command} " in run(command, "--help").stdout


def test_data_goes_to_stdout_and_colour_only_where_it_is_wanted(toy_directory):
    command = [sys.executable, "-m", "melayer", "locate", str(toy_directory), "--text", TEXT]
    plain = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1"}
    )
    assert "\x1b[3" not in plain.stdout  # no colour; bold may stay
    assert plain.stdout.startswith(("The ME layer is block 3", "\x1b[1mThe ME layer is block 3"))


def test_a_report_is_written(toy_directory, tmp_path):
    done = run("report", toy_directory, "--text", TEXT, "--out", tmp_path / "a" / "b", "-T", 16)
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "a" / "b" / "report.json").read_text())
    assert values["locate"]["me_layer"] == values["explain"]["me_layer"] == 3
    assert values["sinks"]["T"] == 16
    # The toy's vocabulary is smaller than the number of first tokens; nothing else is left out.
    assert values["not_measured"].keys() == {"rigidity"}
    assert values["provenance"]["weights_sha256"].keys() == {"model.safetensors"}
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["report.html", "report.json"]


def test_what_cannot_be_measured_takes_nothing_from_the_report(toy_directory, tmp_path):
    done = run("report", toy_directory, "--text", TEXT, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    reason = "No text has T = 64 tokens; the longest has 20. Give longer texts, or a T of at most 20."
    assert f"Note: sinks was not measured. {reason}" in " ".join(done.stderr.split())
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["not_measured"]["sinks"] == reason
    assert "sinks" not in values
    assert values["explain"]["me_layer"] == 3
    assert f"Not measured. {reason}" in (tmp_path / "report.html").read_text()


def test_the_texts_of_a_file_are_measured_and_not_its_syntax(toy_directory, tmp_path):
    path = tmp_path / "c.jsonl"
    texts = [TEXT, toys.text(12, x_at=2, seed=5)]
    path.write_text(
        "".join(json.dumps({"id": place, "body": text, "mine": "w1 w2"}) + "\n" for place, text in enumerate(texts))
    )
    done = run("locate", toy_directory, "--file", path, "--json")
    assert "c.jsonl is read as JSON lines, its texts from the column 'body'." in " ".join(done.stderr.split())
    by_text = run("locate", toy_directory, "--text", texts[0], "--text", texts[1], "--json")
    assert json.loads(done.stdout)["blocks"] == json.loads(by_text.stdout)["blocks"]
    named = json.loads(run("locate", toy_directory, "--file", path, "--column", "mine", "--json").stdout)
    assert named["me_layer"] is None
    assert "--column says how to read a file, but no --file" in failing("locate", toy_directory, "--column", "mine")
    assert "has no columns, so there is no column 'mine'" in failing(
        "locate", toy_directory, "--file", __file__, "--column", "mine"
    )


def test_a_text_that_is_not_utf8_is_refused_before_a_model_is_loaded():
    assert (
        "Text 0 cannot be read: it holds U+DCFF at character 3, half of a surrogate pair. Give it as UTF-8"
        in failing("locate", "./nowhere", "--text", "w1 \udcff")
    )
