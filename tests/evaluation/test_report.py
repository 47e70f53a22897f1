"""The page of an evaluation."""

import dataclasses
import json

import pytest

import hand_made
from hand_made import HOSTILE
from melayer.evaluation.report import FLIPS, section, write_eval_report
from melayer.presentation.figures import BLUE, GREY, label
from rendering import checked

WON, LOST = f"gsm8k: 2 items won by {HOSTILE}", f"gsm8k: 1 items lost by {HOSTILE}"
DIFFERENCES = "Differences from plain, item by item"


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.evaluated()))


def with_answers(change):
    """The result with the outputs of the second variant changed."""
    result = hand_made.evaluated()
    answers = {
        variant: {item: {**answer, **(change if variant == HOSTILE else {})} for item, answer in rows.items()}
        for variant, rows in result.answers["gsm8k"].items()
    }
    return dataclasses.replace(result, answers={"gsm8k": answers})


def test_every_part_is_there(parts):
    made = section(hand_made.evaluated())
    assert (made.key, made.title, made.answer) == ("evaluation", "Does it help?", hand_made.evaluated().sentence)
    assert list(parts) == ["forest", "What follows", "Scores", DIFFERENCES, WON, LOST]


def test_the_takeaway_is_computed(parts):
    assert parts["forest"].takeaway == (
        "With these items a difference of accuracy shows from about 7.5 to 7.5 points on, half the width of its "
        "interval."
    )


def test_the_forest(parts):
    (points,) = parts["forest"].figure["data"]
    assert points["y"] == [f"gsm8k, {label(HOSTILE)}", f"wikitext2, {label(HOSTILE)}"]
    assert points["x"] == [2.5, -50.0]
    assert (points["error_x"]["array"], points["error_x"]["arrayminus"]) == ([7.5, 25.0], [7.5, 25.0])
    assert points["text"] == ["wins 2, losses 1, p 1", "wins 0, losses 9, p 0.008"]
    assert points["marker"]["color"] == [GREY, BLUE]  # only the second difference is shown after correction
    assert [line["x0"] for line in parts["forest"].figure["layout"]["shapes"]] == [0]


def test_less_is_better_is_marked():
    result = hand_made.evaluated()
    change = result.changes[0]
    down = dataclasses.replace(change, comparison=dataclasses.replace(change.comparison, higher_is_better=False))
    made = section(dataclasses.replace(result, changes=(down,)))
    assert made.parts[0].figure["data"][0]["y"] == [f"gsm8k, {label(HOSTILE)} ↓"]
    # What was won is lost where less is better.
    titles = [part.title for part in made.parts]
    assert f"gsm8k: 1 items won by {HOSTILE}" in titles
    assert f"gsm8k: 2 items lost by {HOSTILE}" in titles


def test_where_there_is_no_interval_no_resolution_is_claimed():
    result = hand_made.evaluated()
    change = result.changes[0]
    alone = dataclasses.replace(change, comparison=dataclasses.replace(change.comparison, low=None, high=None))
    found = section(dataclasses.replace(result, changes=(alone,)))
    assert found.parts[0].takeaway == ""
    table = next(part for part in found.parts if getattr(part, "title", "").startswith("Differences"))
    assert table.rows[0][4] == "—"


def test_the_tables(parts):
    assert parts["Scores"].rows[0] == ["gsm8k", "exact_match *", "plain", "50.0%", "35.0% to 65.0%", 40, "4 (10.0%)"]
    assert parts["Scores"].rows[3] == ["wikitext2", "word_perplexity *", HOSTILE, "12.1825", "—", 9, "—"]
    assert parts[DIFFERENCES].rows[0] == [
        "gsm8k", "exact_match *", HOSTILE, "+2.5", "-5.0 to +10.0", 2, 1, 37, "1",
    ]  # fmt: skip
    assert [row[3] for row in parts["What follows"].rows] == [
        change.sentence for change in hand_made.evaluated().changes
    ]


def test_what_flipped_is_shown_with_its_prompt(parts):
    assert parts[WON].rows == [
        ["gsm8k/0", f"How many {HOSTILE}?", "no", HOSTILE],
        ["gsm8k/2", f"How many {HOSTILE}?", "no", "yes"],
    ]
    assert parts[LOST].rows == [["gsm8k/1", f"How many {HOSTILE}?", "yes", "no"]]
    assert parts[WON].prose
    assert parts[WON].folded


def test_long_answers_and_prompts_are_cut_where_they_matter_least():
    result = with_answers({"output": "begins " + "x" * 1000})
    result = dataclasses.replace(result, prompts={"hash": "y" * 1000 + " ends"})
    row = checked(section(result))[WON].rows[0]
    assert row[1].startswith("…y")
    assert row[1].endswith(" ends")
    assert row[3].startswith("begins x")
    assert row[3].endswith("x…")
    assert len(row[1]) == len(row[3]) == 701


def test_blank_lines_and_lists_of_outputs():
    assert checked(section(with_answers({"output": "a\n \n\nb"})))[WON].rows[0][3] == "a\nb"
    assert checked(section(with_answers({"output": ["A", 0.5]})))[WON].rows[0][3] == "['A', 0.5]"


def test_of_many_flips_the_first_are_shown():
    result = hand_made.evaluated()
    one = result.answers["gsm8k"]
    answers = {
        variant: {f"gsm8k/{n:02}": one[variant]["gsm8k/0"] for n in range(FLIPS + 5)} for variant in one
    }  # fmt: skip
    parts = checked(section(dataclasses.replace(result, answers={"gsm8k": answers})))
    table = parts[f"gsm8k: {FLIPS + 5} items won by {HOSTILE}, the first {FLIPS}"]
    assert len(table.rows) == FLIPS


@pytest.mark.parametrize(("same", "said"), [(False, "other items"), (True, "the same items: too good")])
def test_a_chosen_variant_is_judged(same, said):
    table = checked(section(hand_made.chosen(same_items=same)))["The variant that was chosen, judged"]
    assert table.rows[0][:5] == ["gsm8k", "exact_match", HOSTILE, 20, said]
    assert table.takeaway == f"A note on {HOSTILE}."


def test_one_variant_has_scores_alone():
    assert list(checked(section(hand_made.evaluated(compared=False)))) == ["Scores"]


def test_the_page(tmp_path):
    written = write_eval_report(hand_made.evaluated(), tmp_path)
    html = written.html.read_text(encoding="utf-8")
    assert "<th>Model</th><td>[red]&lt;b&gt;:x:&lt;/b&gt;[/], float32, fingerprint 0123</td>" in html
    assert "<td>as plain text, without a chat template</td>" in html
    assert "<td>8, cpu</td>" in html
    assert "<td>Cobbe 2021; lm-eval task version 3.0; items from test.jsonl abababababab</td>" in html
    assert json.loads(written.json.read_text())["evaluation"]["scores"][0]["value"] == 0.5


def test_the_page_of_stored_runs_names_each(tmp_path):
    result = hand_made.evaluated()
    run = result.settings["shared"]
    other = {**run, "chat": True, "model": {**run["model"], "name": "other"}}
    settings = {**result.settings, "shared": {"runs": {"a": run, "b": other}}}
    html = write_eval_report(dataclasses.replace(result, settings=settings), tmp_path).html.read_text(encoding="utf-8")
    assert "<h1>[red]&lt;b&gt;:x:&lt;/b&gt;[/], other</h1>" in html
    assert "<th>Model a</th>" in html
    assert "<th>Model b</th><td>other, float32, fingerprint 0123</td>" in html
    assert "<td>through the chat template</td>" in html
