"""Rows from files of each format, and how they are dealt to lm-eval's tasks."""

import json

import pytest

import small_benchmarks
from hostile import corpora
from melayer.errors import InputError
from melayer.evaluation.local_files import ALIASES, BENCHMARKS, NAMES, custom_dataset, read_splits, splits_by_task
from melayer.evaluation.xstest import rows_of_the_hub


@pytest.fixture
def data(tmp_path):
    return small_benchmarks.write(tmp_path)


def test_each_benchmark_has_its_splits(data):
    for name in NAMES:
        splits = read_splits(name, data).splits
        assert list(splits) == list(BENCHMARKS[name].files)
        for rows in splits.values():
            assert all(set(BENCHMARKS[name].fields) == set(row) for row in rows)
    assert ALIASES["minerva_math500"] == "math500"


def test_lines_of_json_end_at_line_feeds_alone(data):
    rows = [{"question": "a\u2028b\x0bc\x85d", "answer": "e\rf"}, {"question": "g", "answer": "h"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # the last line may have no end
    (data / "gsm8k/train.jsonl").write_bytes(text.encode())
    assert read_splits("gsm8k", data).splits["train"] == rows


def test_fields_of_csv_may_have_lines(data):
    (data / "xstest/xstest_prompts.csv").write_bytes(b'id,prompt,label\r\n1,"How, then?\nNow ""so""",safe\r\n')
    assert read_splits("xstest", data).splits["test"] == [
        {"id": "1", "prompt": 'How, then?\nNow "so"', "label": "safe"}
    ]


def test_a_row_that_cannot_be_asked_is_left_out_and_said(data):
    (data / "gsm8k/test.jsonl").write_text('{"question": "a", "answer": "b"}\n[1]\n{"question": "c"}\n')
    found = read_splits("gsm8k", data)
    assert found.splits["test"] == [{"question": "a", "answer": "b"}]
    assert found.notes == (
        "2 rows are left out of test.jsonl: line 2: a list and no object with fields; line 3: has no field 'answer'.",
    )
    (data / "gsm8k/test.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match=r"test.jsonl holds no items that gsm8k can ask: line 1: a list and no "):
        read_splits("gsm8k", data)


def test_labels_that_xstest_does_not_know_are_counted_and_named(data):
    with (data / "xstest/xstest_prompts.csv").open("a") as file:
        file.write("7,w1 ?,x,Safe\n8,w2 ?,x,\n9,,x,safe\n")
    found = read_splits("xstest", data)
    assert [row["label"] for row in found.splits["test"]] == ["safe", "unsafe"] * 3
    assert found.notes == (
        "3 rows are left out of xstest_prompts.csv: line 14: its label is 'Safe'; expected safe or unsafe; line 15: "
        "its label is ''; expected safe or unsafe; line 16: its prompt is empty.",
    )


def test_the_hubs_rows_of_xstest_are_checked_in_the_same_way(monkeypatch):
    import datasets

    rows = [
        {"id": place, "prompt": f"w{place} ?", "label": label} for place, label in enumerate(["safe", "odd", "unsafe"])
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: rows)
    found = rows_of_the_hub()
    assert [row["label"] for row in found.splits["test"]] == ["safe", "unsafe"]
    assert found.notes == ("1 row is left out of XSTest: row 2: its label is 'odd'; expected safe or unsafe.",)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: rows[1:2])
    with pytest.raises(InputError, match="has no row with a label that is known. 1 row is left out of XSTest"):
        rows_of_the_hub()


@pytest.mark.parametrize("name", corpora.BENCHMARKS)
def test_hostile_rows_cost_themselves_alone(name, tmp_path):
    """What lm-eval is handed makes its task, whatever the file holds; and nothing good is lost."""
    data = corpora.BENCHMARKS[name](tmp_path)
    whole = small_benchmarks.write(tmp_path / "good", n=4)
    for benchmark in NAMES:
        good = read_splits(benchmark, whole)
        assert good.notes == ()
        if corpora.GOOD[name] == 0:
            if (benchmark in ("gsm8k", "xstest", "wikitext2") and not name.startswith("xstest")) or name.startswith(
                benchmark
            ):
                with pytest.raises(InputError, match=r"cannot be read: it is a|holds no items that xstest can ask"):
                    read_splits(benchmark, data)
            continue
        found = read_splits(benchmark, data)
        for split, rows in good.splits.items():
            assert found.splits[split][: len(rows)] == rows
        assert bool(found.notes) == name.startswith(f"{benchmark}_"), found.notes
        custom_dataset(found.splits)()


def test_mmlu_is_a_task_a_subject(data):
    splits = read_splits("mmlu", data).splits
    found = splits_by_task("mmlu", splits)
    assert list(found) == ["mmlu_anatomy", "mmlu_astronomy"]
    for task, of in found.items():
        assert {row["subject"] for rows in of.values() for row in rows} == {task.removeprefix("mmlu_")}
    assert sum(len(of["test"]) for of in found.values()) == len(splits["test"])
    with pytest.raises(InputError, match="mmlu/dev.jsonl has no solved examples of anatomy, of which mmlu/test.jsonl"):
        splits_by_task("mmlu", {**splits, "dev": splits["dev"][6:]})
    assert splits_by_task("mmlu", {}) == {"mmlu": {}}  # the hub has them
    assert list(splits_by_task("gsm8k", splits)) == ["gsm8k"]


def test_what_lm_eval_is_given():
    made = custom_dataset({"test": [{"a": 1}, {"a": 2}], "dev": [{"a": 3}]})(cache_dir=None)
    assert {split: rows["a"][:] for split, rows in made.items()} == {"test": [1, 2], "dev": [3]}
