"""Rows from files of each format, and how they are dealt to lm-eval's tasks."""

import json

import pytest

import small_benchmarks
from melayer.errors import InputError
from melayer.evaluation.local_files import ALIASES, BENCHMARKS, NAMES, custom_dataset, read_splits, splits_by_task


@pytest.fixture
def data(tmp_path):
    return small_benchmarks.write(tmp_path)


def test_each_benchmark_has_its_splits(data):
    for name in NAMES:
        splits = read_splits(name, data)
        assert list(splits) == list(BENCHMARKS[name].files)
        for rows in splits.values():
            assert all(set(BENCHMARKS[name].fields) <= set(row) for row in rows)
    assert ALIASES["minerva_math500"] == "math500"


def test_lines_of_json_end_at_line_feeds_alone(data):
    rows = [{"question": "a\u2028b\x0bc\x85d", "answer": "e\rf"}, {"question": "g", "answer": "h"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # the last line may have no end
    (data / "gsm8k/train.jsonl").write_bytes(text.encode())
    assert read_splits("gsm8k", data)["train"] == rows


def test_fields_of_csv_may_have_lines(data):
    (data / "xstest/xstest_prompts.csv").write_bytes(b'id,prompt,label\r\n1,"How, then?\nNow ""so""",safe\r\n')
    assert read_splits("xstest", data)["test"] == [{"id": "1", "prompt": 'How, then?\nNow "so"', "label": "safe"}]


def test_a_line_that_is_no_object(data):
    (data / "gsm8k/test.jsonl").write_text('{"question": "a", "answer": "b"}\n[1]\n')
    with pytest.raises(InputError, match=r"Line 2 of .*test.jsonl is no JSON object"):
        read_splits("gsm8k", data)


def test_mmlu_is_a_task_a_subject(data):
    splits = read_splits("mmlu", data)
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
