"""`melayer eval` and `melayer compare` as a person types them."""

import functools
import json

import pytest
from lm_eval import tasks

import melayer
import small_benchmarks
import toys
from command import TEXT, defaults, failing, run
from melayer import cli
from melayer.cli.evaluation import COMPARATORS
from melayer.evaluation.store import FILE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_benchmarks.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def given(toy_directory, data):
    return ["eval", toy_directory, "--data", data, "--text", TEXT, "--selector", "random", "--batch-size", 3]


def test_an_evaluation_is_printed_kept_and_gone_on_with(given, tmp_path):
    done = run(*given, "--tasks", "mmlu,xstest", "--mask-rate", "0.5", "--max-new-tokens", 6, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Of 3 comparisons with plain, corrected for their number (Holm)" in done.stdout
    assert "random 0.5 on mmlu: wins" in done.stdout
    assert "the masked first token is not massive" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "report.html", "report.json"]
    kept = set((tmp_path / FILE).read_text().splitlines()[1:])
    more = run(
        *given, "--tasks", "mmlu", "--mask-rate", "0.5,1", "--comparators", ",".join(COMPARATORS), "--out", tmp_path,
        "--json",
    )  # fmt: skip
    assert more.exit_code == 0, more.output
    values = json.loads(more.stdout)
    assert list(values["settings"]["variants"]) == ["plain", "random 0.5", "random 1", *COMPARATORS]
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"] == values
    assert kept < set((tmp_path / FILE).read_text().splitlines())


def test_a_rate_is_chosen_and_judged(given):
    done = run(*given, "--tasks", "mmlu", "--mask-rate", "0.5,1", "--select-on", "even", "--report-on", "odd")
    assert done.exit_code == 0, done.output
    assert "Chosen on the items even, judged on odd" in done.stdout
    assert "mmlu acc: random" in done.stdout
    assert "of 6 items; wins" in " ".join(done.stdout.split())


def test_two_runs_are_compared(given, tmp_path):
    asked = [*given, "--tasks", "mmlu", "--items", 4]
    assert run(*asked, "--out", tmp_path / "a").exit_code == 0
    assert run(*asked, "--mask-rate", "1", "--no-baseline", "--out", tmp_path / "b").exit_code == 0
    done = run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    (change,) = values["changes"]
    assert (change["base"], change["variant"]) == (f"plain ({tmp_path / 'a'})", f"random 1 ({tmp_path / 'b'})")
    assert change["comparison"]["n"] == 8
    assert (tmp_path / "both" / "report.html").exists()
    shown = run("compare", tmp_path / "a", tmp_path / "b")
    assert f"Stored runs: {tmp_path / 'a'}, {tmp_path / 'b'}." in shown.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm9k"], "There is no task 'gsm9k'; expected one of gsm8k, math500"),
        (["--tasks", "mmlu", "--chat"], "The model's tokenizer has no chat template. Leave --chat out"),
        (["--tasks", "mmlu", "--no-baseline"], "Nothing to evaluate: give --baseline, --mask-rate or --comparators."),
        (["--tasks", "mmlu", "--mask-rate", "1.5"], "rate is 1.5"),
        (["--tasks", "mmlu", "--comparators", "magic"], "There is no comparator 'magic'; expected some of set-zero"),
        (["--tasks", "mmlu", "--select-on", "even"], "--select-on and --report-on go together"),
        (
            ["--tasks", "mmlu", "--mask-rate", "1", "--select-on", "even", "--report-on", "0-2"],
            "4 items of mmlu are in --select-on even and in --report-on 0-2",
        ),
        (["--tasks", "ifeval"], "Answers to ifeval may have 1280 tokens"),
    ],
)
def test_bad_input(given, arguments, message, monkeypatch):
    # The list of all of lm-eval's tasks takes seven seconds to make; test_tasks.py looks into it.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    assert message in failing(*given, *arguments)


def test_bad_places(given, data, toy_directory, tmp_path):
    missing = ["eval", toy_directory, "--tasks", "gsm8k", "--data"]
    assert "There is no directory" in failing(*missing, tmp_path / "nowhere")
    assert "gsm8k/train.jsonl is missing" in failing(*missing, tmp_path)
    assert "There is no evaluation at" in failing("compare", tmp_path, tmp_path)
    # The answers of another model are left as they are.
    asked = [*given, "--tasks", "mmlu", "--items", 2, "--out", tmp_path / "kept"]
    assert run(*asked).exit_code == 0
    before = (tmp_path / "kept" / FILE).read_bytes()
    other = tmp_path / "other"
    toys.plant(toys.make("llama", seed=1), [(3, 7, 3000.0)]).save_pretrained(other)
    toys.tokenizer().save_pretrained(other)
    asked[1] = other
    assert "answers of another run: model differs" in failing(*asked)
    assert (tmp_path / "kept" / FILE).read_bytes() == before


def test_options_have_the_defaults_of_the_functions():
    options, evaluate, load_tasks = map(defaults, (cli.evaluation.eval_command, melayer.evaluate, melayer.load_tasks))
    assert {name: options[name] for name in ("chat", "system", "batch_size", "max_length")}.items() <= evaluate.items()
    assert options["items"] == evaluate["limit"]
    assert {name: options[name] for name in ("data", "fewshot", "max_new_tokens")} == {
        name: default for name, default in load_tasks.items() if name not in ("names", "trust_remote_code")
    }
    assert load_tasks["trust_remote_code"] is False
    mask = defaults(melayer.WeMask)
    assert {name: options[name] for name in ("selector", "strength", "seed")}.items() <= mask.items()
