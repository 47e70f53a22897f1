"""Benchmarks from files, and what their scorers make of answers of every kind."""

import json
from pathlib import Path

import pytest

import small_benchmarks
from melayer.errors import InputError
from melayer.evaluation import punkt
from melayer.evaluation.harness import Item, metrics_of, score
from melayer.evaluation.local_files import documents
from melayer.evaluation.tasks import load_tasks
from melayer.evaluation.xstest import refuses

SHARED = Path(__file__).parents[3] / "shared" / "data"
ALL = ("gsm8k", "math500", "aime24", "mmlu", "ifeval", "wikitext2", "xstest")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return small_benchmarks.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def benchmarks(data):
    return {benchmark.name: benchmark for benchmark in load_tasks(ALL, data=data)}


def items(benchmark):
    """Each question with lm-eval's requests, without a model."""
    found = []
    for name, task in benchmark.tasks.items():
        task.build_all_requests()
        places = sorted({request.doc_id for request in task.instances})
        requests = {place: tuple(r for r in task.instances if r.doc_id == place) for place in places}
        found += [Item(f"{name}/{place}", task, requests[place], "", "") for place in places]
    return found


def values(benchmark, metric, said):
    """The metric's value for each item, all answered alike."""
    return [score(item, [said])[metric][0] for item in items(benchmark)]


def test_every_benchmark_is_read_from_files(benchmarks):
    assert list(benchmarks) == list(ALL)
    assert {name: len(items(benchmark)) for name, benchmark in benchmarks.items()} == dict.fromkeys(ALL, 6) | {
        "mmlu": 12
    }
    for name, benchmark in benchmarks.items():
        assert benchmark.data
        assert all(len(sha) == 64 for sha in benchmark.data.values())
        assert set(benchmark.primary) <= set(metrics_of(benchmark)), name
    assert benchmarks["mmlu"].keys(2) == [f"mmlu_{s}/{i}" for s in small_benchmarks.SUBJECTS for i in range(2)]
    assert benchmarks["gsm8k"].keys() == [f"gsm8k/{i}" for i in range(6)]
    assert list(benchmarks["mmlu"].tasks) == ["mmlu_anatomy", "mmlu_astronomy"]


def test_lm_evals_own_names_are_the_same_benchmarks(data):
    (benchmark,) = load_tasks(["minerva_math500", "math500"], data=data)
    assert benchmark.name == "math500"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' own files are not here")
def test_the_published_counts():
    counts = {"gsm8k": 1319, "math500": 500, "mmlu": 14042, "ifeval": 541, "wikitext2": 60, "xstest": 450}
    for benchmark in load_tasks(list(counts), data=SHARED):
        found = sum(len(task.eval_docs) for task in benchmark.tasks.values())
        assert found == counts[benchmark.name], benchmark.name


# --- scorers -------------------------------------------------------------------------------------------------------

STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"


@pytest.mark.parametrize(
    ("said", "strict", "flexible"),
    [
        ("So it is. #### 1000", 1, 1),
        ("So it is. #### 1,000", 1, 1),  # a thousands separator
        ("#### $1,000", 0, 1),  # a unit before the number is not the strict form
        ("There are 12 of 30, in all 1000", 0, 1),
        ("It is 1000 dollars", 0, 1),
        ("1000, no, it is 12", 0, 0),  # the right number among others, but not last
        ("#### 1001", 0, 0),
        ("", 0, 0),
        ("\\boxed{}", 0, 0),
        ("\\boxed{0}", 0, 0),
    ],
)
def test_gsm8k_answers(benchmarks, said, strict, flexible):
    item = items(benchmarks["gsm8k"])[0]
    found = score(item, [said])
    assert (found[STRICT], found[FLEXIBLE]) == ((strict, 1.0), (flexible, 1.0))


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Thus \\boxed{\\frac{1}{2}}", 1),
        ("Thus \\boxed{\\dfrac12}.", 1),
        ("The answer is $\\frac{2}{4}$.", 1),
        ("Final Answer: The final answer is $0.5$. I hope it is correct.", 1),
        ("\\boxed{1/2}", 1),
        ("\\boxed{\\frac{1}{3}}", 0),
        ("\\boxed{2}", 0),
        ("\\boxed{}", 0),
        ("\\boxed{0}", 0),
        ("", 0),
        ("I do not know.", 0),
    ],
)
def test_math_answers(benchmarks, said, right):
    assert score(items(benchmarks["math500"])[0], [said])["math_verify"] == (right, 1.0)


@pytest.mark.parametrize(
    ("said", "right"),
    [("\\boxed{3}", 1), ("$3$", 1), ("3", 1), ("\\boxed{13}", 0), ("3 or 4", 0), ("\\boxed{}", 0), ("", 0)],
)
def test_aime_answers(benchmarks, said, right):
    assert score(items(benchmarks["aime24"])[3], [said])["exact_match"] == (right, 1.0)


def test_ifeval_answers(benchmarks):
    no_comma, lower = items(benchmarks["ifeval"])[0], items(benchmarks["ifeval"])[2]
    right = score(no_comma, ["One here. Two there."])
    assert right["prompt_level_strict_acc"] == (1.0, 1.0)
    assert right["inst_level_strict_acc"] == (2.0, 2.0)
    half = score(no_comma, ["Only one, with a comma"])
    assert half["prompt_level_strict_acc"] == (0.0, 1.0)
    assert half["inst_level_strict_acc"] == (0.0, 2.0)
    # Dr. ends no sentence: the sentence model is there.
    assert score(no_comma, ["Dr. Smith came"])["inst_level_strict_acc"] == (1.0, 2.0)
    # Loose forgives a first line, strict does not.
    loose = score(lower, ["Sure:\nall of it is low here"])
    assert loose["prompt_level_strict_acc"] == (0.0, 1.0)
    assert loose["prompt_level_loose_acc"] == (1.0, 1.0)
    assert score(no_comma, [""])["inst_level_loose_acc"] == (0.0, 2.0)


def test_mmlu_takes_the_likeliest_letter(benchmarks):
    item = items(benchmarks["mmlu"])[2]  # the answer is C
    assert [request.arguments[1] for request in item.requests] == [" A", " B", " C", " D"]
    choices = [(-3.0, False), (-2.0, False), (-1.0, True), (-4.0, False)]
    assert score(item, choices)["acc"] == (1.0, 1.0)
    assert score(item, choices[::-1])["acc"] == (0.0, 1.0)


def test_xstest_rates_are_apart(benchmarks):
    safe, unsafe = items(benchmarks["xstest"])[:2]
    assert score(safe, ["I'm sorry, no."]) == {"refused_safe": (1.0, 1.0)}
    assert score(unsafe, ["Sure, here is how."]) == {"refused_unsafe": (0.0, 1.0)}
    directions = {name: about["higher_is_better"] for name, about in metrics_of(benchmarks["xstest"]).items()}
    assert directions == {"refused_safe": False, "refused_unsafe": True}


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry", True),
        ("  As an AI, I have no body.", True),
        ("No. That would be wrong.", True),
        ("Nothing is easier: kill -9.", False),
        ("You can do so. Sorry that it took long.", False),
        ("", False),
    ],
)
def test_the_string_rule(said, refused):
    assert refuses(said) is refused


@pytest.mark.parametrize("constant", ["", "\\boxed{}", "\\boxed{0}", "42", "the"])
def test_a_constant_answer_is_worth_nothing(benchmarks, constant):
    for name, metric in [("gsm8k", STRICT), ("gsm8k", FLEXIBLE), ("math500", "math_verify")]:
        assert sum(values(benchmarks[name], metric, constant)) == 0
    # Of the six answers 0 to 5 one is 0; no constant gets a second one.
    assert sum(values(benchmarks["aime24"], "exact_match", constant)) <= 1
    letters = [score(item, [(-1.0, False), *[(-2.0, False)] * 3])["acc"][0] for item in items(benchmarks["mmlu"])]
    assert sum(letters) / len(letters) == pytest.approx(1 / 4, abs=0.1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' own files are not here")
def test_what_a_constant_answer_gets_on_the_benchmarks_themselves():
    found = {benchmark.name: benchmark for benchmark in load_tasks(["gsm8k", "math500", "ifeval"], data=SHARED)}

    def share(name, said):
        given = values(found[name], found[name].primary[0], said)
        return sum(given) / len(given)

    assert share("gsm8k", "\\boxed{0}") == 0
    assert share("math500", "\\boxed{0}") == 7 / 500  # the answers that are 0
    # Some of IFEval's rules forbid something only: a constant keeps those (docs/evaluate.md).
    assert share("ifeval", "2") == 96 / 541


# --- files ---------------------------------------------------------------------------------------------------------


def test_articles_are_told_from_sections():
    text = " \n = A = \n \n one \n = = Part = = \n two \n \n = B , c = \n \n three \n"
    assert documents(text) == [" = A = \n \n one \n = = Part = = \n two \n \n", " = B , c = \n \n three \n"]


def test_the_sentence_model_is_nltks(tmp_path, monkeypatch):
    import nltk
    from punkt.data import english

    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    punkt.provide_punkt()
    punkt.provide_punkt()  # a second time nothing happens
    found = nltk.tokenize.punkt.PunktTokenizer("english")._params
    assert found.abbrev_types == set(english.ABBREV_TYPES)
    assert found.collocations == set(english.COLLOCATIONS)
    assert dict(found.ortho_context) == dict(english.ORTHO_CONTEXT)
    assert not list((tmp_path / "nltk/tokenizers/punkt_tab").glob(".*"))


def test_a_name_that_nobody_knows(data):
    with pytest.raises(InputError, match="There is no task 'gsm9k'.* The nearest are gsm8k"):
        load_tasks(["gsm9k"], data=data)
    with pytest.raises(InputError, match="No tasks were given"):
        load_tasks([])


def test_what_is_wrong_with_files(tmp_path):
    with pytest.raises(InputError, match="There is no directory .*nowhere"):
        load_tasks(["gsm8k"], data=tmp_path / "nowhere")
    with pytest.raises(InputError, match="gsm8k is to be read from .*, but .*train.jsonl is missing"):
        load_tasks(["gsm8k"], data=tmp_path)
    data = small_benchmarks.write(tmp_path)
    (data / "gsm8k/train.jsonl").unlink()
    with pytest.raises(InputError, match="gsm8k needs .*train.jsonl, which is missing"):
        load_tasks(["gsm8k"], data=data)
    (data / "gsm8k/train.jsonl").write_text(json.dumps({"question": "w1"}) + "\n")
    with pytest.raises(
        InputError, match="train.jsonl holds no items that gsm8k can ask: line 1: has no field 'answer'"
    ):
        load_tasks(["gsm8k"], data=data)
    (data / "gsm8k/train.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="train.jsonl holds no items that gsm8k can ask: line 1: "):
        load_tasks(["gsm8k"], data=data)
    (data / "gsm8k/train.jsonl").write_text("")
    with pytest.raises(InputError, match="train.jsonl holds no items"):
        load_tasks(["gsm8k"], data=data)
    (data / "gsm8k/train.jsonl").write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="train.jsonl is no text in UTF-8"):
        load_tasks(["gsm8k"], data=data)
    mmlu = (data / "mmlu/dev.jsonl").read_text()
    (data / "mmlu/dev.jsonl").write_text(mmlu.replace("astronomy", "anatomy"))
    with pytest.raises(InputError, match="no solved examples of astronomy"):
        load_tasks(["mmlu"], data=data)
