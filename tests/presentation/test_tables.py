import io
import json

import pytest
from rich.console import Console

import melayer
import toys
from melayer.evaluation.select import compare_runs
from melayer.evaluation.store import FILE
from melayer.evaluation.table import show_eval
from melayer.measurements.locate.table import show_locate


def printed(result, width: int = 80) -> str:
    file = io.StringIO()
    show_locate(result, Console(file=file, width=width))
    return file.getvalue()


@pytest.fixture(scope="module")
def result():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    return melayer.locate(model, toys.tokenizer(), texts=[toys.text(20, x_at=4), "w1 w2"], name="toy [bold]")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_ever_cut(result, width):
    lines = printed(result, width).splitlines()
    assert all(len(line) <= width for line in lines)
    shown = next(line for line in lines if "<- ME layer" in line)
    row = result.blocks[3]
    assert shown.split() == [
        "3", f"{row.max_abs:,.1f}", f"{row.ratio:,.0f}", "4", "X", "7", "1", "1/1", "+100.0%", "<-", "ME", "layer",
    ]  # fmt: skip


def test_markup_in_names_is_text(result):
    assert "toy [bold]" in printed(result)


def test_notes_and_texts_are_shown(result):
    text = printed(result)
    assert "Too short to vote on the ME layer (fewer than 8 tokens): 1 of 2 texts." in text
    assert "too short" in text.rpartition("Texts")[2]


def test_long_names_of_stored_runs_take_no_number_from_a_comparison(tmp_path):
    metric = {"exact_match,flexible-extract": {"kind": "mean", "higher_is_better": True, "primary": True}}
    about = {"metrics": metric, "generation": None, "lm_eval_tasks": {}, "data_sha256": {}, "cite": "", "limit": None}
    settings = {"shared": {"model": {"name": "m"}}, "tasks": {"gsm8k": about}, "variants": {"saved mask": None}}
    for where, right in (("a-long-name-of-a-run", 11), ("another-long-name-of-a-run", 34)):
        (tmp_path / where).mkdir()
        rows = [
            {
                "task": "gsm8k", "variant": "saved mask", "item": f"gsm8k/{i}", "prompt": "p", "output": "",
                "scores": {"exact_match,flexible-extract": [float(i < right), 1.0]}, "tokens": 1, "seconds": 0.1,
            }
            for i in range(60)
        ]  # fmt: skip
        lines = [{"eval_of": settings}, *rows]
        (tmp_path / where / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_runs(tmp_path / "a-long-name-of-a-run", tmp_path / "another-long-name-of-a-run")
    file = io.StringIO()
    show_eval(found, Console(file=file, width=80))
    table = file.getvalue().partition("Against")[2].partition("What follows")[0]
    change = found.changes[0].comparison
    for number in ("+38.3", "23", "0", f"{change.adjusted:.3g}"):
        assert number in table.split(), (number, table)
