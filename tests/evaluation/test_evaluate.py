"""One run answers every item with every variant; its figures, its store, its ways to stop and go on."""

import json
import signal

import pytest
import torch

import children
import small_benchmarks
import toys
from melayer.errors import InputError, OutputError
from melayer.evaluation.evaluate import evaluate
from melayer.evaluation.harness import harness
from melayer.evaluation.select import compare_runs, select
from melayer.evaluation.store import FILE
from melayer.evaluation.tasks import load_tasks
from melayer.interventions.mask import WeMask
from melayer.numerics.paired import wilson
from melayer.runs import jsonl

TASKS = ["gsm8k", "mmlu", "wikitext2", "xstest"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_benchmarks.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def benchmarks(data):
    return load_tasks(TASKS, data=data, max_new_tokens=24)


@pytest.fixture(scope="module")
def model():
    return toys.plant(toys.make("llama"), [(3, 7, 3000.0)])


def variants():
    return {"plain": None, "mask": WeMask(rate=0.5, layers=range(4, 8)), "all": WeMask(rate=1, layers=range(4, 8))}


def run(model, benchmarks, which=None, **options):
    given = {"batch_size": 2, "max_length": 512, **options}
    return evaluate(model, toys.tokenizer(), benchmarks, which or variants(), **given)


@pytest.fixture(scope="module")
def result(model, benchmarks):
    return run(model, benchmarks)


def rows(directory, *, seconds=False):
    lines = jsonl.read(directory / FILE, "", "").values
    return [line if seconds else {key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_every_item_is_answered_by_every_variant(result):
    for name, n in {"gsm8k": 6, "mmlu": 12, "wikitext2": 6, "xstest": 6}.items():
        assert {label: len(found) for label, found in result.answers[name].items()} == dict.fromkeys(variants(), n)
    assert result.answers["wikitext2"]["plain"] != result.answers["wikitext2"]["mask"]


def test_figures_are_those_of_the_answers(result):
    (acc,) = [score for score in result.scores if score.task == "mmlu" and score.variant == "mask"]
    right = sum(answer["scores"]["acc"][0] for answer in result.answers["mmlu"]["mask"].values())
    share = wilson(int(right), 12)
    assert (acc.value, acc.low, acc.high, acc.n) == (share.value, share.low, share.high, 12)
    for change in result.changes:
        scores = {s.variant: s.value for s in result.scores if (s.task, s.metric) == (change.task, change.metric)}
        if change.kind == "mean":
            assert change.comparison.difference == pytest.approx(scores[change.variant] - scores["plain"])
            flips = list(result.flips(change))
            assert len(flips) == change.comparison.wins + change.comparison.losses
        if change.kind == "word_perplexity":
            log = torch.tensor([scores["plain"], scores[change.variant]]).log()
            assert change.comparison.difference == pytest.approx(float(log[0] - log[1]), abs=1e-5)
    assert [s.n for s in result.scores if s.task == "xstest" and s.variant == "plain"] == [3, 3]
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["sentence"] == result.sentence


def test_a_task_that_is_judged_twice_is_named_with_its_metric(result):
    names = {result.place(change) for change in result.changes if change.primary}
    assert names == {"gsm8k", "mmlu", "wikitext2", "xstest refused_safe", "xstest refused_unsafe"}


def test_holm_is_over_what_a_benchmark_is_judged_by(result):
    judged = [change for change in result.changes if change.primary]
    assert len(judged) == 2 * 5  # two masks; gsm8k, mmlu, wikitext2 and two of xstest
    assert all(change.comparison.p_holm is not None for change in judged)
    assert all(change.comparison.p_holm is None for change in result.changes if not change.primary)


def test_plain_is_what_lm_eval_itself_finds(model, data, benchmarks):
    # lm-eval puts BOS before whole texts, which this tokenizer does not by itself.
    result = run(model, benchmarks, {"plain": None}, bos=True)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # the tasks are given: lm_eval need not read all of its own
    for benchmark in load_tasks(TASKS, data=data, max_new_tokens=24):
        lm = HFLM(pretrained=model, tokenizer=toys.tokenizer(), batch_size=2, max_length=512)
        found = lm_eval.simple_evaluate(
            lm, tasks=list(benchmark.tasks.values()), task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        ours = result.answers[benchmark.name]["plain"]
        for name, samples in found["samples"].items():
            for sample in samples:
                said = [part[0] for part in sample["resps"]]
                stored = ours[f"{name}/{sample['doc_id']}"]["output"]
                if isinstance(said[0], str):
                    assert stored == said[0]
                else:
                    pairs = zip(torch.tensor(stored).flatten(), torch.tensor(said).flatten(), strict=True)
                    assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in pairs)
        scores = {s.metric: s for s in result.scores if s.task == benchmark.name and s.variant == "plain"}
        if len(benchmark.tasks) == 1:
            (figures,) = found["results"].values()
            for key, value in figures.items():
                metric, _, filtered = key.partition(",")
                name = key if key in scores else metric
                if name in scores and isinstance(value, float):
                    assert scores[name].value == pytest.approx(value, rel=1e-6), (key, filtered)


def nll_of(model, ids):
    """Of all tokens but the first, each from all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return -torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


@pytest.mark.parametrize("adds", [False, True])
def test_a_whole_text_begins_as_the_tokenizer_begins_it(model, benchmarks, adds):
    tokenizer = toys.beginning_tokenizer() if adds else toys.tokenizer()
    (wikitext,) = [benchmark for benchmark in benchmarks if benchmark.name == "wikitext2"]
    (task,) = wikitext.tasks.values()
    for bos, first in ((None, [1] * adds), (True, [1]), (False, [])):
        found = evaluate(model, tokenizer, [wikitext], {"plain": None}, batch_size=2, max_length=512, bos=bos)
        begins = "BOS (<s>)" if first else "the text's first token, which is not predicted"
        assert found.settings["tasks"]["wikitext2"]["begins_with"] == begins
        for place, answer in enumerate(found.answers["wikitext2"]["plain"].values()):
            text = task.doc_to_target(task.eval_docs[place])
            ids = [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert answer["output"] == pytest.approx(nll_of(model, ids), rel=1e-5)


def test_prompts_begin_once_also_where_only_some_bring_bos(model):
    tokenizer = toys.beginning_tokenizer()
    with harness(model, tokenizer, batch_size=2, max_length=None) as lm:
        for texts in (["w4", "<s> w4"], ["<s> w4", "w4"], ["<s> w4", "<s> w4"], ["w4", "w4"]):
            ids, mask = lm.tok_batch_encode(texts)
            assert ids.tolist() == [[1, 7], [1, 7]], texts


def test_a_whole_text_longer_than_the_model_is_scored_in_windows(model, tmp_path):
    data = small_benchmarks.write(tmp_path, n=2)
    (data / "wikitext2/wiki.test.raw").write_text(f" \n = w1 = \n \n {toys.text(50, x_at=None)} \n")
    (wikitext,) = load_tasks(["wikitext2"], data=data)
    found = evaluate(model, toys.tokenizer(), [wikitext], {"plain": None}, batch_size=2, max_length=16)
    (answer,) = found.answers["wikitext2"]["plain"].values()
    (task,) = wikitext.tasks.values()
    ids = toys.tokenizer()(task.doc_to_target(task.eval_docs[0]))["input_ids"]
    # As lm-eval's windows go: each token once, from the one before the window on.
    expected, done = 0.0, 1
    expected += nll_of(model, ids[:17])
    done = 17
    while done < len(ids):
        end = min(done + 16, len(ids))
        start = end - 17
        with torch.no_grad():
            logits = model(torch.tensor([ids[start : end - 1]]), use_cache=False).logits[0].float().log_softmax(-1)
        expected += sum(logits[at - start - 1, ids[at]].item() for at in range(done, end))
        done = end
    assert answer["output"] == pytest.approx(expected, rel=1e-5)


def test_rows_that_cannot_be_asked_are_said_beside_the_scores(model, tmp_path):
    data = small_benchmarks.write(tmp_path, n=2)
    with (data / "xstest/xstest_prompts.csv").open("a") as file:
        file.write("7,w1 ?,x,Safe\n")
    found = run(model, load_tasks(["xstest"], data=data, max_new_tokens=4), {"plain": None})
    note = "1 row is left out of xstest_prompts.csv: line 6: its label is 'Safe'; expected safe or unsafe."
    assert note in found.notes
    assert note in found.to_dict()["notes"]


def test_log_likelihoods_are_added_up_in_float32(model, benchmarks):
    import copy

    half = copy.deepcopy(model).bfloat16()
    found = run(half, benchmarks[2:3], {"plain": None}).answers["wikitext2"]["plain"]
    sums = [answer["output"] for answer in found.values()]
    # Sums in bfloat16 are bfloat16 numbers; the logits alone are.
    assert not all(float(torch.tensor(value).bfloat16()) == value for value in sums)


def test_the_model_and_the_tokenizer_are_as_before(benchmarks):
    model, tokenizer = toys.make("llama").train(), toys.tokenizer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, tokenizer, benchmarks[1:2], {"plain": None}, batch_size=4)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert tokenizer.padding_side == toys.tokenizer().padding_side
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- the store -----------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_found(model, benchmarks, result, tmp_path):
    kept = run(model, benchmarks, store=tmp_path)
    assert kept.to_dict()["scores"] == result.to_dict()["scores"]
    head, *found = rows(tmp_path, seconds=True)
    assert len(found) == 3 * 30
    assert set(found[0]) == {
        "task",
        "variant",
        "item",
        "prompt",
        "output",
        "scores",
        "tokens",
        "seconds",
        "cut",
        "failed",
    }
    # Going on with nothing left asks the model nothing.
    before = (tmp_path / FILE).read_bytes()
    again = run(model, benchmarks, store=tmp_path, progress=lambda *_: pytest.fail("asked again"))
    assert (tmp_path / FILE).read_bytes() == before
    assert again.to_dict() == kept.to_dict()


def test_tasks_and_variants_can_be_added(model, benchmarks, result, tmp_path):
    run(model, benchmarks[:2], {"plain": None}, store=tmp_path)
    asked = []
    added = run(model, benchmarks, store=tmp_path, progress=lambda done, total: asked.append((done, total)))
    assert asked[0][0] == 18 + 2  # what was there, and the first batch
    assert added.to_dict()["scores"] == result.to_dict()["scores"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4}, "answers of another run: batch_size differs"),
        ({"limit": 1}, "task mmlu differs"),
        ({"which": {"plain": WeMask(rate=0.1, layers=[5])}}, "variant plain differs"),
    ],
)
def test_other_settings_never_mix(model, benchmarks, tmp_path, options, message):
    run(model, benchmarks[1:2], {"plain": None}, store=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InputError, match=message):
        run(model, benchmarks[1:2], **{"which": {"plain": None}, "store": tmp_path, **options})
    with pytest.raises(InputError, match="answers of another run: model differs"):
        run(toys.make("llama", seed=1), benchmarks[1:2], {"plain": None}, store=tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_an_option_that_is_newer_than_the_store_and_not_set_changes_nothing(model, benchmarks, tmp_path):
    which = {"mask": variants()["mask"]}
    run(model, benchmarks[1:2], which, store=tmp_path)
    older, *rest = jsonl.read(tmp_path / FILE, "", "").values
    assert older["eval_of"]["variants"]["mask"].pop("by_layer") is None
    jsonl.replace(tmp_path / FILE, [older, *rest])
    run(model, benchmarks[1:2], which, store=tmp_path, progress=lambda *_: pytest.fail("asked again"))


def test_what_is_no_store_is_left_alone(model, benchmarks, tmp_path):
    (tmp_path / FILE).write_text("a diary\nof two lines\n")
    with pytest.raises(OutputError, match="eval.jsonl was not written by melayer, so it is left as it is"):
        run(model, benchmarks[1:2], store=tmp_path)
    assert (tmp_path / FILE).read_text() == "a diary\nof two lines\n"
    (tmp_path / FILE).write_text("a diary")
    with pytest.raises(OutputError, match="eval.jsonl was not written by melayer, so it is left as it is"):
        run(model, benchmarks[1:2], store=tmp_path)
    assert (tmp_path / FILE).read_text() == "a diary"


def test_comparing_leaves_a_run_that_is_being_written_as_it_is(model, benchmarks, tmp_path):
    run(model, benchmarks[1:2], {"plain": None}, store=tmp_path / "a")
    run(model, benchmarks[1:2], {"mask": variants()["mask"]}, store=tmp_path / "b")
    with (tmp_path / "b" / FILE).open("a") as file:
        file.write('{"task": "mml')
    before = (tmp_path / "b" / FILE).read_bytes()
    assert compare_runs(tmp_path / "a", tmp_path / "b").changes[0].comparison.n == 12
    assert (tmp_path / "b" / FILE).read_bytes() == before


def test_a_full_disk(model, benchmarks, result, tmp_path, monkeypatch):
    import errno

    appended = []

    def append(path, values):
        if len(appended) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        appended.append(path)
        kept_append(path, values)

    kept_append = jsonl.append
    monkeypatch.setattr(jsonl, "append", append)
    with pytest.raises(OutputError, match="The answers cannot be kept in .*: No space left on device"):
        run(model, benchmarks, store=tmp_path)
    monkeypatch.setattr(jsonl, "append", kept_append)
    asked = []
    rest = run(model, benchmarks, store=tmp_path, progress=lambda done, total: asked.append(done))
    assert asked[0] > 2  # the batches before the disk was full are there
    assert rest.to_dict()["scores"] == result.to_dict()["scores"]


def answered(data, out, reached, kill_at=None):
    """One run, here or in a process of its own; the items done go to a file, and at the step `kill_at` it is killed."""
    steps = []

    def progress(done, total):
        steps.append(done)
        reached.write_text(json.dumps(steps))
        if len(steps) == kill_at:
            children.kill()

    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    which = {label: mask for label, mask in variants().items() if label != "all"}
    some = load_tasks(["gsm8k", "mmlu", "wikitext2"], data=data, max_new_tokens=24)
    scores = run(model, some, which, store=out, progress=progress).to_dict()["scores"]
    print(json.dumps(scores))
    return scores


def test_killed_three_times_and_in_two_processes_it_ends_the_same(data, tmp_path):
    whole = answered(data, tmp_path / "whole", tmp_path / "reached")
    first = []
    for _ in range(3):
        process = children.started(answered, data, tmp_path / "killed", tmp_path / "reached", 4)
        assert children.ended(process) == -signal.SIGKILL
        first.append(json.loads((tmp_path / "reached").read_text())[0])
    assert first == sorted(set(first))  # each began where the one before was killed
    assert answered(data, tmp_path / "killed", tmp_path / "reached") == whole
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    with children.together(2) as environments:
        two = [
            children.started(
                answered, data, tmp_path / "two", tmp_path / f"reached {rank}", output=tmp_path / f"said {rank}",
                **environment,
            )
            for rank, environment in enumerate(environments)
        ]  # fmt: skip
        assert [children.ended(process) for process in two] == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"said {rank}").read_text().splitlines()[-1]) == whole
    assert rows(tmp_path / "two") == rows(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "two").iterdir()] == [FILE]


# --- choosing and comparing ----------------------------------------------------------------------------------------


def test_a_variant_is_chosen_on_some_items_and_judged_on_others(result):
    found = select(result, on="even", report_on="odd")
    chosen = {one.metric: one for one in found.chosen if one.task == "mmlu"}["acc"]
    values = {
        label: sum(a["scores"]["acc"][0] for key, a in answers.items() if int(key.split("/")[1]) % 2 == 0) / 6
        for label, answers in result.answers["mmlu"].items()
        if label != "plain"
    }
    assert chosen.value == max(values.values()) == values[chosen.variant]
    assert (chosen.selected_on, chosen.change.comparison.n, chosen.same_items) == (6, 6, False)
    assert all(key.split("/")[1] in "135" for key in found.answers["mmlu"]["plain"])
    assert "judged on odd" in found.notes[-1]


def test_choosing_and_judging_by_the_same_items_is_refused(result):
    with pytest.raises(InputError, match="3 items of gsm8k are in --select-on 0-3 and in --report-on 1-: .*"):
        select(result, on="0-3", report_on="1-")
    found = select(result, on="0-3", report_on="1-", allow_same_items=True)
    assert all(one.same_items for one in found.chosen)
    assert "too good" in found.notes[-1]
    with pytest.raises(InputError, match="has no items in 100-"):
        select(result, on="0-2", report_on="100-")
    with pytest.raises(InputError, match="'some' names no items"):
        select(result, on="some", report_on="odd")


def test_stored_runs_are_compared(model, benchmarks, tmp_path):
    run(model, benchmarks[:2], {"plain": None}, store=tmp_path / "a")
    run(model, benchmarks[1:], {"mask": variants()["mask"]}, store=tmp_path / "b")
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert {change.task for change in found.changes} == {"mmlu"}
    assert found.changes[0].base == f"plain ({tmp_path / 'a'})"
    direct = run(model, benchmarks[1:2], {"plain": None, "mask": variants()["mask"]})
    assert found.changes[0].comparison == direct.changes[0].comparison
    with pytest.raises(InputError, match="There is no evaluation at"):
        compare_runs(tmp_path / "a", tmp_path / "c")
    run(model, benchmarks[2:3], {"plain": None}, store=tmp_path / "c")
    with pytest.raises(InputError, match="have no items in common"):
        compare_runs(tmp_path / "a", tmp_path / "c")


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_cannot_be_asked(model, benchmarks, data):
    with pytest.raises(InputError, match="has no chat template. Leave --chat out"):
        run(model, benchmarks, chat=True)
    with pytest.raises(InputError, match="A system prompt needs a chat template"):
        run(model, benchmarks, system="Be kind.")
    with pytest.raises(InputError, match="Nothing to evaluate"):
        run(model, [], {"plain": None})
    with pytest.raises(InputError, match="Answers to ifeval may have 1280 tokens, and the model has room for 512"):
        run(model, load_tasks(["ifeval"], data=data))


def test_the_chat_template_is_used(model, benchmarks):
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    found = evaluate(model, tokenizer, benchmarks[:1], {"plain": None}, batch_size=2, max_length=512, system="Be kind.")
    assert found.settings["shared"]["chat"] is True
    assert all(text.startswith("[system] Be kind. [user] Question:") for text in found.prompts.values())
