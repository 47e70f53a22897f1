"""The page of a training run."""

import dataclasses
import json

import pytest

import hand_made
from hand_made import HOSTILE
from melayer.presentation.figures import BLUE, VERMILLION
from melayer.tuning.report import CURVES, section, some, training_steps, write_tune_report
from rendering import checked


@pytest.fixture(scope="module")
def parts():
    return checked(section(*hand_made.tuned()))


def test_every_part_is_there(parts):
    result, history = hand_made.tuned()
    made = section(result, history)
    assert (made.key, made.title, made.answer) == ("tune", "How training went", result.sentence)
    assert list(parts) == ["tune-loss", "tune-grad_norm", "Some steps"]


def test_takeaways_are_computed(parts):
    assert parts["tune-loss"].takeaway == "4 at step 1, 2.5 at step 3."
    assert parts["tune-grad_norm"].takeaway == "2 at step 1, 1 at step 3."


def test_the_curves_of_training_and_validation(parts):
    training, validation = parts["tune-loss"].figure["data"]
    assert (training["x"], training["y"], training["line"]["color"]) == ([1, 2, 3], [4.0, 3.0, 2.5], BLUE)
    assert (validation["x"], validation["y"], validation["line"]["color"]) == ([0, 3], [3.5, 2.75], VERMILLION)
    (norm,) = parts["tune-grad_norm"].figure["data"]
    assert (norm["x"], norm["y"]) == ([1, 3], [2.0, 1.0])  # the norm of step 2 is not known
    assert parts["Some steps"].rows == [[1, "4.0000", "2.0000"], [2, "3.0000", "—"], [3, "2.5000", "1.0000"]]


def test_a_single_step_has_no_curve():
    result, history = hand_made.tuned()
    assert list(checked(section(result, history[:2]))) == ["Some steps"]


def test_every_curve_has_a_place_of_its_own():
    result, _ = hand_made.tuned()
    history = [{"step": step, **dict.fromkeys(CURVES, 0.5)} for step in (1, 2)]
    keys = list(checked(section(result, history)))[:-1]
    assert keys[1:3] == ["tune-reward", "tune-rewards-correctness-mean"]
    assert len(set(keys)) == len(CURVES)


def test_some_lines_of_many():
    lines = [{"step": step} for step in range(1, 101)]
    assert some(lines[:10]) == lines[:10]
    assert [line["step"] for line in some(lines, 4)] == [1, 34, 67, 100]


def test_lines_of_validation_are_no_steps():
    _, history = hand_made.tuned()
    assert [line["step"] for line in training_steps(history)] == [1, 2, 3]


@pytest.mark.parametrize("masked", [True, False])
def test_the_page_lies_beside_the_model(masked, tmp_path):
    result, history = hand_made.tuned()
    result = dataclasses.replace(result, out=str(tmp_path), mask=result.mask if masked else None, adapter=masked)
    written = write_tune_report(result, history, command="melayer tune")
    assert written.html == tmp_path / "report.html"
    html = written.html.read_text(encoding="utf-8")
    assert "<h1>sft on [red]&lt;b&gt;:x:&lt;/b&gt;[/]</h1>" in html
    assert f"<th>Mask</th><td>{'weight 0.5, strength 1, blocks 2, 3' if masked else 'none'}</td>" in html
    assert f"<th>Trained</th><td>{'a LoRA adapter' if masked else 'all weights'}</td>" in html
    assert "<td>[red]&lt;b&gt;:x:&lt;/b&gt;[/]: 12 rows, sha256 cdcdcdcdcdcd</td>" in html
    values = json.loads(written.json.read_text())
    assert values["log"] == history
    assert values["tune"]["settings"]["data"]["source"] == HOSTILE
