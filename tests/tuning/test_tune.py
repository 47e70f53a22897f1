"""Fine-tuning as it is used: from Python and from the command line, with what a run leaves behind."""

import json
import re

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import melayer
import small_benchmarks
import small_runs
import toys
from command import defaults, failing, run
from melayer import cli
from melayer.cli import tuning as commands
from melayer.errors import MelayerWarning
from melayer.interventions.mask import WeMask

QUICK = ("--steps", 2, "--batch-size", 2, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    small_runs.model().save_pretrained(directory)
    toys.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    found = {}
    for method, rows in (("sft", small_runs.answers()), ("dpo", small_runs.pairs()), ("grpo", small_runs.problems())):
        found[method] = directory / f"{method}.jsonl"
        found[method].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def tuned(base, files, tmp_path_factory):
    """What one command left behind, and what it printed."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    done = run(
        "tune", "sft", base, "--data", files["sft"], "--out", out, *QUICK, "--mask-rate", 0.5, "--validation", 0.25,
        "--text", toys.text(20, x_at=0),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return out, done


def test_the_directory_holds_all_of_it(tuned):
    out, done = tuned
    assert "2 steps of sft under a mask (weight 0.5): the loss went from" in done.stdout
    assert "The mask is on wherever the policy runs: in training and evaluation." in done.stdout
    assert "Validation at step 0: loss" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "melayer_mask.json", "melayer_tune.json", "log.jsonl", "report.html", "report.json", "checkpoint-2",
        "README.md",
    }  # fmt: skip
    record = json.loads((out / "melayer_tune.json").read_text())
    assert record["status"] == "finished"
    assert record["settings"]["config"]["learning_rate"] == 1e-3
    assert record["settings"]["data"]["rows"] == 12
    assert {"torch", "trl", "peft", "transformers", "melayer"} <= set(record["versions"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(0, False), (1, True), (2, True), (2, False)]
    # Somebody who loads it wants to generate, quickly.
    assert json.loads((out / "config.json").read_text())["use_cache"] is True
    assert not json.loads((out / "generation_config.json").read_text()).get("disable_compile")


def test_the_page_shows_the_curves(tuned):
    out, _ = tuned
    html = re.sub(r"<script>.*?</script>", "", (out / "report.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert 'id="plot-tune-loss"' in html
    assert "2 steps of sft under a mask (weight 0.5): the loss went from" in html
    assert "melayer " in html  # the command
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.DOTALL).group(1))
    assert [trace["name"] for trace in figures["tune-loss"]["data"]] == ["training", "validation"]
    assert len(json.loads((out / "report.json").read_text())["log"]) == 4


def test_what_comes_out_goes_in(tuned, tmp_path):
    out, _ = tuned
    with pytest.warns(MelayerWarning) as said:
        loaded = melayer.load(str(out))
    # The mask was made for the trained weights, so there is nothing else to say.
    own = [str(warning.message)[:19] for warning in said if issubclass(warning.category, MelayerWarning)]
    assert own == ["The mask saved with"]
    assert loaded.mask.me_layer == small_runs.ME
    WeMask.detach(loaded.model)
    (tmp_path / "data").mkdir()
    small_benchmarks.write(tmp_path / "data")
    text = ("--text", toys.text(20, x_at=0))
    commands = [("locate", out, *text), ("report", out, "--out", tmp_path / "report", *text)]
    commands += [("eval", out, "--tasks", "wikitext2", "--data", tmp_path / "data", "--items", 2)]
    for command in commands:
        done = run(*command)
        assert done.exit_code == 0, done.output
        assert "The mask saved with" in done.stderr


def test_contrast_says_what_it_measured(tuned, base, tmp_path):
    out, _ = tuned
    arguments = ("contrast", base, out, "-T", 8, "--n-first-tokens", 8, "--text", toys.text(20, x_at=0))
    done = run(*arguments, "--out", tmp_path / "page")
    assert done.exit_code == 0, done.output
    assert "The ME layer is block 3 in both; the sink rate after block 3" in done.stdout
    assert "Masked: under the mask of the second model (weight 0.5, strength 1)." in done.stdout
    for column in ("before, masked", "after, masked", "by training", "by the mask", "by both"):
        assert column in done.stdout
    assert (tmp_path / "page" / "report.html").exists()
    values = json.loads(run(*arguments, "--json").stdout)
    assert [values[name]["mask"] is None for name in ("before", "before_masked", "after", "after_masked")] == [
        True, False, True, False,
    ]  # fmt: skip
    of = {figure["name"]: figure for figure in values["figures"]}["effective rank of what attention reads"]
    assert of["before_masked"] != of["before"]  # what the mask does to the model that was never trained with it
    whole = of["training"] + of["mask"] + of["interaction"]
    assert whole == pytest.approx(of["after_masked"] - of["before"])
    without = json.loads(run(*arguments, "--no-mask", "--json").stdout)
    assert (without["notes"], without["before_masked"], without["after_masked"]) == ([], None, None)
    # The same weights without the mask: what was measured beside it.
    assert without["figures"][5]["after"] == {f["name"]: f for f in values["figures"]}["sink rate"]["after"]


def test_contrast_with_a_plain_second_model_leaves_the_first_one_s_mask_out(tuned, base):
    out, _ = tuned
    arguments = ("contrast", out, base, "-T", 8, "--n-first-tokens", 8, "--text", toys.text(20, x_at=0), "--json")
    values = json.loads(run(*arguments).stdout)
    assert (values["before"]["mask"], values["before_masked"], values["after_masked"]) == (None, None, None)
    assert [note for note in values["notes"] if "is left out" in note] == [
        "Before: The mask saved with it is left out: figures under a mask are under that of the second model."
    ]


def test_a_model_that_comes_with_a_mask_keeps_it_in_training(tuned, files, tmp_path):
    out, _ = tuned
    done = run("tune", "sft", out, "--data", files["sft"], "--out", tmp_path / "again", *QUICK)
    assert done.exit_code == 0, done.output
    assert WeMask.load(tmp_path / "again").by_layer == WeMask.load(out).by_layer
    done = run("tune", "sft", out, "--data", files["sft"], "--out", tmp_path / "no", "--mask-rate", 0.5)
    assert done.exit_code == 2
    message = " ".join(done.stderr.split())
    assert "comes with a mask, which is on in training too. Leave --mask-rate out, or give --no-mask." in message


@pytest.mark.parametrize(("method", "more"), [("dpo", ("--lora",)), ("grpo", ("--instruction", ""))])
def test_the_other_methods(method, more, base, files, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("num_generations: 4\nmax_completion_length: 4\n" if method == "grpo" else "beta: 0.2\n")
    done = run(
        "tune", method, base, "--data", files[method], "--out", tmp_path / "out", "--steps", 2, "--mask-rate", 0.5,
        "--layers", "4-", "--reference", "plain", "--config", config, *more, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["method"], result["reference"], result["steps"]) == (method, "plain", 2)
    assert result["adapter"] == (method == "dpo")
    assert result["mask"]["layers"] == [4, 5, 6, 7]
    assert any("not masked" in note for note in result["notes"])
    with pytest.warns(MelayerWarning, match="is applied"):
        melayer.load(str(tmp_path / "out"))


def test_the_same_seed_is_the_same_run(base, files, tmp_path):
    weights = []
    for name in ("a", "b"):
        done = run("tune", "sft", base, "--data", files["sft"], "--out", tmp_path / name, *QUICK, "--seed", 3)
        assert done.exit_code == 0, done.output
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


# --- wrong input ----------------------------------------------------------------------------------------------------


def test_one_sentence_for_whatever_is_wrong(base, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sft = ("tune", "sft", base, "--data", files["sft"], "--out", out)
    assert "There is no file missing.jsonl" in failing("tune", "sft", base, "--data", "missing.jsonl", "--out", out)
    assert "--columns 'prompt' was given; expected e.g. prompt=question" in failing(*sft, "--columns", "prompt")
    assert "--columns says prompt=x, but" in failing(*sft, "--columns", "prompt=x")
    assert "rate is 1.5; expected a share between 0 and 1" in failing(*sft, "--mask-rate", 1.5)
    assert "--layers says which blocks are masked, but there is no mask. Add --mask-rate." in failing(
        *sft, "--layers", "4-"
    )
    assert "reference is 'other'; expected one of masked, plain" in failing(
        "tune", "dpo", base, "--data", files["dpo"], "--out", out, "--reference", "other"
    )
    config = tmp_path / "c.yaml"
    config.write_text("learnin_rate: 1")
    assert "sft has no option 'learnin_rate'. Did you mean learning_rate?" in failing(*sft, "--config", config)
    config.write_text("max_length: 1000")
    assert "max_length is 1000, but the model has 256 positions" in failing(*sft, "--config", config)
    config.write_text("num_generations: 4\nmax_completion_length: 256\n")
    grpo = ("tune", "grpo", base, "--data", files["grpo"], "--out", out, "--config", config)
    assert "so there is no room for a prompt" in failing(*grpo)
    assert "There is no run in" in failing(*sft, "--resume")
    # None of these left anything that would stand in the way of a right one.
    assert not out.exists() or not list(out.iterdir())


def test_an_extra_that_is_not_installed(base, files, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    message = failing("tune", "sft", base, "--data", files["sft"], "--out", tmp_path / "o")
    assert "Fine-tuning needs trl, which is not installed. Get it with: pip install 'melayer[tune]'" in message


# --- the command line and the functions -----------------------------------------------------------------------------


def test_options_have_the_names_and_defaults_of_the_functions():
    # What the command line has under another name, or as several options.
    elsewhere = {"model", "tokenizer", "data", "out", "mask", "lora", "columns", "validation", "limit", "rewards"}
    elsewhere |= {"parts", "name", "progress"}
    for method in ("sft", "dpo", "grpo"):
        options, function = defaults(getattr(commands, f"{method}_command")), defaults(getattr(melayer, method))
        for name, default in function.items():
            if name not in elsewhere:
                assert options[name] == default, (method, name)


def test_help_has_an_example():
    for method in ("sft", "dpo", "grpo"):
        done = CliRunner().invoke(cli.app, ["tune", method, "--help"], env={"COLUMNS": "120"})
        assert f"melayer tune {method} demo --data" in " ".join(done.output.split())


def test_metrics_go_where_they_are_reported(tmp_path):
    config = small_runs.small(max_steps=2, report_to="tensorboard")
    melayer.sft(small_runs.model(), toys.tokenizer(), small_runs.answers(), out=tmp_path, config=config)
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.demo
def test_the_demo_model_learns_under_the_mask(demo, tmp_path):
    import copy

    model = copy.deepcopy(demo.model)
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(4, 12)]
    mask = WeMask(rate=0.3, layers=range(12, 30))
    config = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "gradient_checkpointing": False}
    result = melayer.sft(model, demo.tokenizer, rows, out=tmp_path, mask=mask, lora=True, config=config, name="demo")
    assert result.last["loss"] < result.first["loss"]
    with pytest.warns(MelayerWarning, match="is applied"):
        loaded = melayer.load(str(tmp_path))
    assert loaded.mask.by_layer == mask.fixed(demo.model).by_layer


REFUSED = {
    "learning rate": (["--learning-rate", "-1"], "The option learning_rate is -1.0; expected 0 or more"),
    "seed": (["--seed", str(2**64)], "--seed is 18446744073709551616; expected at most 4294967295"),
    "rank": (["--lora", "--lora-targets", "nowhere"], "The trainer refuses this: "),
    "config": (["--config", "{config}"], "The option trust_remote_code cannot be set in the config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_after_a_command_that_is_refused_the_corrected_one_runs_in_the_same_place(name, base, files, tmp_path):
    options, said = REFUSED[name]
    (tmp_path / "c.yaml").write_text("trust_remote_code: true\n")
    options = [str(option).format(config=tmp_path / "c.yaml") for option in options]
    common = ["tune", "sft", base, "--data", files["sft"], "--out", tmp_path / "out"]
    refused = run(*common, *QUICK[:2], *options)
    assert refused.exit_code == 2
    assert said in " ".join(refused.stderr.split())
    assert refused.stdout == ""
    assert not (tmp_path / "out").exists()
    done = run(*common, *QUICK)
    assert done.exit_code == 0, done.output


def test_somebodys_card_is_left_alone_and_ours_says_what_loads_it(tuned, base, files, tmp_path):
    text = (tuned[0] / "README.md").read_text()
    assert "It was trained under the mask (SFT, `melayer tune`)." in text
    assert "`AutoModelForCausalLM.from_pretrained` loads the weights without the mask" in text
    assert "melayer.load(" in (tuned[0] / "checkpoint-2" / "README.md").read_text()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    done = run("tune", "sft", base, "--data", files["sft"], "--out", tmp_path / "out", *QUICK, "--mask-rate", 0.5,
               "--text", toys.text(20, x_at=0))  # fmt: skip
    assert done.exit_code == 2, done.output
    assert "holds README.md already, which a run may have to write" in " ".join(done.stderr.split())
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"
