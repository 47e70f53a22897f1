"""Items that cannot be asked or judged are counted, named and left out; the others are answered."""

import json

import pytest
import torch

import small_benchmarks
import toys
from melayer.errors import InputError
from melayer.evaluation import harness as harness_module
from melayer.evaluation.evaluate import evaluate
from melayer.evaluation.faults import fault, left_out_note
from melayer.evaluation.select import compare_runs, select
from melayer.evaluation.store import FILE
from melayer.evaluation.tasks import load_tasks


@pytest.fixture
def data(tmp_path):
    return small_benchmarks.write(tmp_path / "data")


def change(path, place, **fields):
    """Other values in one row of a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[place] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(benchmarks, **options):
    return evaluate(
        toys.make("llama"), toys.tokenizer(), benchmarks, {"plain": None}, batch_size=4, max_length=256, **options
    )


def answered(result, task):
    return [key.rpartition("/")[2] for key in result.answers[task]["plain"]]


def spoiled(name, doc):
    """A benchmark as it comes from the hub, where nobody looked at its rows: one of them is replaced."""
    task = next(iter(name.tasks.values()))
    rows = [dict(row) for row in task.eval_docs]
    rows[1] = {**rows[1], **doc}
    split = task.config.test_split
    task.dataset = {**task.dataset, split: rows}
    return name


@pytest.mark.parametrize(
    ("name", "doc", "why"),
    [
        ("mmlu", {"answer": 9}, "its answer is 9, and it has 4 choices"),
        ("mmlu", {"answer": -1}, "its answer is -1, and it has 4 choices"),
        ("mmlu", {"answer": "E"}, "its answer is 'E', and it has 4 choices"),
        ("mmlu", {"answer": None}, "its answer is empty"),
        ("mmlu", {"choices": ["one"]}, "has no element 1"),
        ("mmlu", {"question": "  "}, "its question is empty"),
        ("gsm8k", {"question": None}, "its question is empty"),
        ("gsm8k", {"answer": ""}, "its answer is empty"),
        ("ifeval", {"prompt": "\n"}, "its prompt is empty"),
    ],
)
def test_a_row_that_cannot_be_asked(data, name, doc, why):
    (benchmark,) = load_tasks([name], data=data, max_new_tokens=4, fewshot=0)
    with harness_module.harness(toys.make("llama"), toys.tokenizer(), batch_size=4, max_length=256) as lm:
        asked = harness_module.items_of(spoiled(benchmark, doc), lm, chat=False, system=None, limit=None)
    first = next(iter(benchmark.tasks))
    assert list(asked.left_out) == [f"{first}/1"]
    assert why in asked.left_out[f"{first}/1"]
    assert len(asked.items) == sum(len(task.eval_docs) for task in benchmark.tasks.values()) - 1
    assert [item.key for item in asked.items][:2] == [f"{first}/0", f"{first}/2"]  # the places stay


def test_what_is_left_out_is_said_and_kept(data, tmp_path):
    (benchmark,) = load_tasks(["mmlu"], data=data, fewshot=0)
    result = run([spoiled(benchmark, {"answer": 9})], store=tmp_path / "run")
    assert answered(result, "mmlu") == ["0", "2", "3", "4", "5", *map(str, range(6))]
    assert [score.n for score in result.scores] == [11]
    said = (
        "1 of 12 items of mmlu left out, which cannot be asked or judged (mmlu_anatomy/1: its answer is 9, and it has "
        "4 choices)."
    )
    assert result.notes == (said,)
    assert result.to_dict()["settings"]["tasks"]["mmlu"]["left_out"] == {
        "mmlu_anatomy/1": "its answer is 9, and it has 4 choices"
    }
    assert said in compare_runs(tmp_path / "run", tmp_path / "run").notes
    assert any("left out" in note for note in select(result, on="even", report_on="odd").notes)


def test_nothing_is_left_out_of_good_rows(data):
    benchmarks = load_tasks(["gsm8k", "mmlu", "ifeval", "wikitext2", "xstest", "aime24"], data=data, max_new_tokens=4)
    with harness_module.harness(toys.make("llama"), toys.tokenizer(), batch_size=4, max_length=512) as lm:
        for benchmark in benchmarks:
            asked = harness_module.items_of(benchmark, lm, chat=False, system=None, limit=None)
            assert asked.left_out == {}, benchmark.name
            assert {item.n_lost for item in asked.items} == {0}


def test_where_no_row_can_be_asked(data):
    (benchmark,) = load_tasks(["mmlu"], data=data, fewshot=0)
    for task in benchmark.tasks.values():
        task.dataset = {**task.dataset, "test": [{**row, "answer": 4} for row in task.eval_docs]}
    with pytest.raises(
        InputError, match=r"12 of 12 items of mmlu left out.*mmlu_anatomy/0: its answer is 4.*and 9 more"
    ):
        run([benchmark])


def test_a_row_that_a_tasks_own_preparation_fails_on(data):
    """Minerva's takes the answer out of a box; a solution without one would end the whole task."""
    change(data / "math500/test.jsonl", 2, solution="There is no box.")
    (benchmark,) = load_tasks(["math500"], data=data, max_new_tokens=4)
    assert list(benchmark.unread) == ["minerva_math500, row 2 of test"]
    result = run([benchmark])
    assert len(result.answers["math500"]["plain"]) == 5
    assert "1 of 6 items of math500 left out" in result.notes[0]


def test_an_answer_that_the_scorer_fails_on(data, tmp_path, monkeypatch):
    """Whatever a task's own code raises costs that item alone, under every variant, and the run goes on."""
    (benchmark,) = load_tasks(["gsm8k"], data=data, max_new_tokens=4, fewshot=0)
    score = harness_module.score

    def failing(item, said):
        if item.key.endswith("/3"):
            raise LookupError("\n  no such resource\n")
        return score(item, said)

    monkeypatch.setattr(harness_module, "score", failing)
    result = run([benchmark], store=tmp_path)
    assert {found.n for found in result.scores} == {5}
    assert result.answers["gsm8k"]["plain"]["gsm8k/3"]["scores"] == {}
    assert "1 of 6 items of gsm8k left out, which have no score under plain (gsm8k/3: " in " ".join(result.notes)
    kept = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()[1:]]
    assert [row["item"] for row in kept if row["failed"]] == ["gsm8k/3"]


def test_log_likelihoods_that_are_not_finite(data):
    """A NaN is the largest of all to lm-eval, so that a broken model would be right a quarter of the time."""
    model = toys.make("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    benchmarks = load_tasks(["mmlu", "wikitext2"], data=data, fewshot=0)
    result = evaluate(model, toys.tokenizer(), benchmarks, {"a": None, "b": None}, batch_size=4, max_length=256)
    assert result.scores == result.changes == ()
    assert result.sentence == "No metric that a benchmark is judged by could be compared; see the notes."
    assert (
        "12 of 12 items of mmlu left out, which have no score under a (mmlu_anatomy/0: the log-likelihood is"
        in (result.notes[0])
    )
    json.dumps(result.to_dict(), allow_nan=False)


def test_prompts_that_lose_their_beginning(data):
    benchmarks = load_tasks(["gsm8k", "mmlu"], data=data, max_new_tokens=4, fewshot=2)
    result = evaluate(toys.make("llama"), toys.tokenizer(), benchmarks, {"plain": None}, batch_size=4, max_length=24)
    cut = {task: about["prompts_cut"] for task, about in result.settings["tasks"].items()}
    tokenizer = toys.tokenizer()
    prompts = {row["item"]: result.prompts[row["prompt"]] for row in result.answers["gsm8k"]["plain"].values()}
    assert cut["gsm8k"] == {item: len(tokenizer(text)["input_ids"]) + 4 - 24 for item, text in prompts.items()}
    assert cut["mmlu"]
    assert "6 of 6 prompts of gsm8k lose their beginning" in result.notes[0]


def test_a_batch_that_the_model_cannot_answer(data, monkeypatch):
    (benchmark,) = load_tasks(["mmlu"], data=data, fewshot=0)
    model = toys.make("llama")
    with harness_module.harness(model, toys.tokenizer(), batch_size=4, max_length=256) as lm:
        items = harness_module.items_of(benchmark, lm, chat=False, system=None, limit=None).items

        def broken(*_, **__):
            raise RuntimeError("out of memory\nmore lines")

        monkeypatch.setattr(lm, "_model_call", broken)
        with pytest.raises(InputError, match=r"^The batch of mmlu_anatomy/0 cannot be answered: out of memory\. Give"):
            harness_module.answer(items[:2], lm)


def test_a_choice_without_tokens(data):
    (benchmark,) = load_tasks(["mmlu"], data=data, fewshot=0)
    task = next(iter(benchmark.tasks.values()))
    assert fault(task, dict(task.eval_docs[0])) is None
    task.config.doc_to_choice = ["A", "", "C", "D"]
    assert fault(task, dict(task.eval_docs[0])) == "'' is no choice"


def test_the_first_are_named():
    found = left_out_note("t", {f"t/{i}": "why" for i in range(5)}, 9, "cannot be read")
    assert found == "5 of 9 items of t left out, which cannot be read (t/0: why; t/1: why; t/2: why; and 2 more)."
