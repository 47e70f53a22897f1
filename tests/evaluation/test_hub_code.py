"""Nothing runs that was not asked for: task files, metrics from the hub, programs that the model writes."""

import logging
import sys

import pytest

import small_benchmarks
import toys
from melayer.errors import InputError
from melayer.evaluation import tasks
from melayer.evaluation.evaluate import evaluate
from melayer.evaluation.hub_code import hub_code
from melayer.evaluation.tasks import Benchmark, load_tasks

TASK = """
task: evil
dataset_path: json
dataset_kwargs: {data_files: rows.jsonl}
test_split: train
output_type: generate_until
doc_to_text: !function evil_code.run
doc_to_target: a
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A task's file with a program beside it, in the working directory."""
    (tmp_path / "evil.yaml").write_text(TASK)
    (tmp_path / "included.yaml").write_text("include: evil.yaml\ntask: included\n")
    (tmp_path / "rows.jsonl").write_text('{"q": "w1"}\n')
    (tmp_path / "evil_code.py").write_text("open('ran', 'w').close()\n\ndef run(doc):\n    return 'w1'\n")
    (tmp_path / "my_metric").mkdir()
    (tmp_path / "my_metric" / "my_metric.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["evil.yaml", "./evil.yaml", "included.yaml", "{}/evil.yaml", "{}/evil", ".\\evil"])
def test_a_tasks_file_is_not_taken(evil, name):
    with pytest.raises(InputError, match=r"is a file: tasks are taken by name alone, since .* \(!function\)"):
        load_tasks([name.format(evil)])
    assert not (evil / "ran").exists()


def test_a_name_that_is_a_file_here_is_still_no_task(evil):
    with pytest.raises(InputError, match="There is no task 'evil'"):
        load_tasks(["evil"])
    assert not (evil / "ran").exists()
    assert "evil_code" not in sys.modules


def configured(**changes):
    """A task of lm-eval's class with items of its own."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = datasets.Dataset.from_list([{"q": "w1", "a": "w2"}, {"q": "w3", "a": "w2"}])
    config = {
        "task": "own", "custom_dataset": lambda **_: {"test": rows}, "output_type": "generate_until",
        "test_split": "test", "num_fewshot": 0, "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": [], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    return ConfigurableTask(config=config | changes)


@pytest.fixture
def other(monkeypatch):
    """Whatever name is asked for, this task is what lm-eval makes of it."""

    def given(**changes):
        monkeypatch.setattr(tasks, "_manager_of", lambda names: None)
        monkeypatch.setattr(tasks, "_other", lambda name, *_: Benchmark(name, {"own": configured(**changes)}, (), {}))

    return given


def metric(name, **more):
    return {"metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True, **more}]}


@pytest.mark.parametrize("more", [{}, {"hf_evaluate": True}])
def test_a_metric_that_is_a_program_is_not_run(evil, other, more):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    other(**metric("my_metric", **more))
    with pytest.raises(InputError, match=r"The metric 'my_metric' is a program from the hub.*Give --trust-remote-code"):
        load_tasks(["anything"])
    assert not (evil / "ran").exists()


def test_a_metric_that_was_asked_for_is_loaded(evil, other):
    """As lm-eval itself does it: the file in the working directory runs, and holds no metric."""
    other(**metric("my_metric"))
    load_tasks(["anything"], trust_remote_code=True)
    assert (evil / "ran").exists()


def test_a_metric_that_is_loaded_while_scoring_is_not_run(evil):
    def process(doc, results):
        import evaluate as metrics

        return {"exact_match": metrics.load("my_metric").compute(doc, results)}

    task = configured(process_results=process)
    task.set_config("generation_kwargs", {"max_gen_toks": 3}, update=True)
    benchmark = Benchmark("own", {"own": task}, (), {})
    result = evaluate(toys.make("llama"), toys.tokenizer(), [benchmark], {"plain": None}, max_length=64)
    assert "2 of 2 items of own left out, which have no score under plain" in result.notes[0]
    assert "is a program from the hub" in result.notes[0]
    assert not (evil / "ran").exists()


def test_what_was_there_comes_back():
    import evaluate as metrics

    before = metrics.load
    with pytest.raises(ZeroDivisionError), hub_code(False) as refused:
        assert refused == []
        assert metrics.load is not before
        raise ZeroDivisionError
    assert metrics.load is before
    with hub_code(True):
        assert metrics.load is before


def test_programs_that_the_model_writes_are_not_run(other):
    other(unsafe_code=True)
    with pytest.raises(
        InputError, match="The task own runs the programs that the model writes, which melayer does not"
    ):
        load_tasks(["anything"], trust_remote_code=True)


def test_humaneval_is_refused_by_what_it_is():
    """Its module asks the hub for a program while it is read."""
    with pytest.raises(InputError, match="The metric 'code_eval' is a program from the hub"):
        load_tasks(["humaneval"])


def test_a_task_that_votes_is_refused(other):
    other(repeats=8)
    with pytest.raises(InputError, match="The task own asks each question 8 times and votes, which is not supported"):
        evaluate(toys.make("llama"), toys.tokenizer(), load_tasks(["anything"]), {"plain": None}, max_length=512)


def test_a_tasks_own_length_of_answers_by_any_name(other):
    other(generation_kwargs={"until": [], "max_new_tokens": 7})
    assert _answer_limit(load_tasks(["anything"])) == 7
    assert _answer_limit(load_tasks(["anything"], max_new_tokens=3)) == 3
    other()
    assert _answer_limit(load_tasks(["anything"])) == 256


def _answer_limit(benchmarks):
    return benchmarks[0].tasks["own"].config.generation_kwargs["max_gen_toks"]


def test_whatever_lm_eval_raises_is_one_sentence(tmp_path, monkeypatch):
    import lm_eval.tasks

    def broken(self, spec):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(lm_eval.tasks.TaskManager, "load", broken)
    data = small_benchmarks.write(tmp_path)
    with pytest.raises(InputError, match=r"^lm-eval cannot make the task gsm8k: it is nested too deeply\. Look at"):
        load_tasks(["gsm8k"], data=data)
