"""Whether an answer was cut off, seen where it is generated: tokens that end it, stop strings, padding, order."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import small_benchmarks
import toys
from melayer.evaluation import harness as harness_module
from melayer.evaluation.cut_off import CUT_SHARE, watched
from melayer.evaluation.evaluate import evaluate
from melayer.evaluation.select import compare_runs, select
from melayer.evaluation.store import FILE
from melayer.evaluation.tasks import load_tasks

LIMIT, EOS, OTHER_EOS, PAD = 4, 2, 9, 0
W = {f"w{i}": i + 3 for i in range(20)}


@pytest.fixture
def lm():
    model = toys.make("llama")
    with harness_module.harness(model, toys.tokenizer(), batch_size=8, max_length=64) as made:
        yield made


def scripted(lm, monkeypatch, rows):
    """The model generates these tokens, by prompt; what comes behind an end is padding, as transformers does it."""

    def generate(input_ids, max_length, **_):
        prompts = [lm.tokenizer.decode(row, skip_special_tokens=True) for row in input_ids]
        made = [rows[prompt] for prompt in prompts]
        width = min(max(map(len, made)), max_length - input_ids.shape[1])
        padded = [(row + [PAD] * width)[:width] for row in made]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    monkeypatch.setattr(lm.model, "generate", generate, raising=False)


def request(prompt, until=()):
    from lm_eval.api.instance import Instance

    arguments = (prompt, {"until": list(until), "max_gen_toks": LIMIT, "do_sample": False})
    return Instance("generate_until", {}, arguments, 0, metadata=("t", 0, 1))


def cut(lm, requests):
    with watched(lm) as found:
        outputs = lm.generate_until([copy.copy(one) for one in requests], disable_tqdm=True)
    return [found[one.args[0]].popleft() for one in requests], outputs


@pytest.mark.parametrize(
    ("generated", "until", "expected"),
    [
        ([40, 41, 42, 43], [], True),
        ([40, 41, 42, EOS], [], False),  # it ends with the very last token that it may have
        ([40, EOS], [], False),
        ([40, 41, 42, OTHER_EOS], [], False),  # a second token that ends, of the generation config alone
        ([40, 41, 42, W["w5"]], ["w5"], False),  # a stop string in the last token
        ([40, W["w5"], 42, 43], ["w5"], False),  # and behind it what other rows of the batch were waited for
        ([40, W["w15"], 42, 43], ["w1"], False),  # as lm-eval looks for it: anywhere in the text
        ([40, 41, 42, 43], ["w5", ""], True),
        ([PAD, 41, 42, 43], [], True),  # a padding token that was generated ends nothing
    ],
)
def test_what_ends_an_answer(lm, monkeypatch, generated, until, expected):
    lm.model.generation_config.eos_token_id = [EOS, OTHER_EOS]
    # Beside it a longer row, for which the batch goes on.
    scripted(lm, monkeypatch, {"w1 w2": generated, "w1 w2 w3": [40, 41, 42, 43]})
    assert cut(lm, [request("w1 w2", until), request("w1 w2 w3", until)])[0] == [expected, True]


def test_each_answer_keeps_its_own(lm, monkeypatch):
    """lm-eval asks the longest first; the same prompt twice, and requests of other settings, stay apart."""
    scripted(lm, monkeypatch, {"w1": [5, 6, 7, 8], "w1 w2 w3": [5, EOS], "w2 w4": [5, 6, 7, EOS]})
    asked = [request("w1"), request("w1 w2 w3"), request("w2 w4"), request("w1", ["w3"]), request("w1 w2 w3", ["w2"])]
    assert cut(lm, asked)[0] == [True, False, False, False, False]  # the token 6 is w3, at which the fourth stops


def test_a_checkpoints_own_limit_does_not_stand_in_for_the_tasks(lm):
    lm.model.generation_config.max_new_tokens = 2
    lm.model.generation_config.eos_token_id = None
    flags, outputs = cut(lm, [request("w1 w2")])
    assert len(outputs[0].split()) == LIMIT or not flags[0]
    assert lm.model.generation_config.max_new_tokens == 2  # as it was


def test_nothing_of_it_stays(lm):
    before = lm.cache_hook
    with pytest.raises(ZeroDivisionError), watched(lm):
        raise ZeroDivisionError
    assert lm.cache_hook is before
    assert "_model_generate" not in vars(lm)


def test_against_generating_alone(tmp_path):
    """A real model: each prompt by itself through transformers, whose row is as long as it may be, or ends."""
    model = toys.make("llama", seed=3)
    data = small_benchmarks.write(tmp_path)
    (benchmark,) = load_tasks(["gsm8k"], data=data, max_new_tokens=6, fewshot=0)
    # Of these random weights half of the answers end by themselves.
    ends = [int(torch.randint(3, toys.VOCAB, (1,), generator=torch.Generator().manual_seed(s))) for s in range(24)]
    model.generation_config.eos_token_id = ends
    result = evaluate(model, toys.tokenizer(), [benchmark], {"plain": None}, batch_size=4, max_length=256)
    tokenizer, expected = toys.tokenizer(), {}
    (task,) = benchmark.tasks.values()
    stops = task.config.generation_kwargs["until"]
    for key, row in result.answers["gsm8k"]["plain"].items():
        prompt = next(text for digest, text in result.prompts.items() if digest == row["prompt"])
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        new = out[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(new)
        expected[key] = len(new) == 6 and new[-1] not in ends and not any(stop in text for stop in stops)
    assert {key: row["cut"] for key, row in result.answers["gsm8k"]["plain"].items()} == expected
    (score, *_) = result.scores
    assert (score.n_cut, score.n_cut_unknown) == (sum(expected.values()), 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stored run of two tasks, of which the first generates and none of its answers ends."""
    model = toys.make("llama")
    model.generation_config.eos_token_id = None
    where = tmp_path_factory.mktemp("run")
    benchmarks = load_tasks(
        ["xstest", "mmlu"], data=small_benchmarks.write(tmp_path_factory.mktemp("data")), max_new_tokens=5
    )
    result = evaluate(model, toys.tokenizer(), benchmarks, {"plain": None}, batch_size=4, max_length=256, store=where)
    return SimpleNamespace(result=result, where=where, benchmarks=benchmarks, model=model)


def test_it_stands_beside_the_score_with_a_warning(run):
    scores = {(score.task, score.metric): score for score in run.result.scores}
    assert (scores["xstest", "refused_safe"].n_cut, scores["xstest", "refused_safe"].n) == (3, 3)
    assert scores["mmlu", "acc"].n_cut is None
    assert scores["xstest", "refused_safe"].cut == "3 (100.0%)"
    (note,) = run.result.notes
    assert note == (
        "More than 5% of the answers to xstest were cut off at 5 tokens (6 of 6 under plain): its scores are of what "
        "came before, and can be off by as much. Raise --max-new-tokens (load_tasks(max_new_tokens=...))."
    )
    values = run.result.to_dict()
    assert [score["n_cut"] for score in values["scores"]] == [3, 3, None]
    assert select(run.result, on="0-1", report_on="2-").scores[0].n_cut == 2


def test_the_advice_is_right(run):
    """With more tokens the count is of the longer answers."""
    longer = load_tasks(["xstest"], data=run.where.parent / "data0", max_new_tokens=9)
    found = evaluate(run.model, toys.tokenizer(), longer, {"plain": None}, batch_size=4, max_length=256)
    assert "cut off at 9 tokens" in found.notes[0]


def test_answers_of_an_older_version_are_not_known(run, tmp_path):
    head, *rows = map(json.loads, (run.where / FILE).read_text().splitlines())
    for row in rows[: len(rows) // 2]:
        del row["cut"], row["failed"]
    lines = [head, *rows]
    for line in lines:  # nor had its lines checksums
        del line["crc32"]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_runs(run.where, tmp_path)
    older = [score for score in found.scores if score.variant.endswith(f"({tmp_path})") and score.task == "xstest"]
    assert sum(score.n_cut_unknown for score in older) == 6
    assert {score.cut for score in older} == {"unknown"}
    assert any("is not known of those that an older version kept (6 under plain" in note for note in found.notes)


def test_a_few_answers_are_counted_and_not_warned_of():
    from melayer.evaluation.notes import notes_of

    about = {"generation": {"max_gen_toks": 8}}
    rows = {f"t/{i}": {"cut": i < 5} for i in range(100)}
    assert CUT_SHARE == 0.05
    assert list(notes_of("t", about, {"plain": rows})) == []
    rows["t/5"] = {"cut": True}
    assert len(list(notes_of("t", about, {"plain": rows}))) == 1
