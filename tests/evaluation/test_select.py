"""Choosing on some items and judging on others, and stored runs against each other, all from answers made by hand."""

import pytest

from melayer.errors import InputError
from melayer.evaluation.scoring import scored
from melayer.evaluation.select import compare_runs, select, split
from stored_answers import answer, answers, metric, settings, write

KEYS = [f"t/{place}" for place in range(10)]


@pytest.mark.parametrize(
    ("part", "places"),
    [
        ("even", [0, 2, 4, 6, 8]),
        ("odd", [1, 3, 5, 7, 9]),
        ("3", [3]),
        ("0-2", [0, 1, 2]),
        ("8-", [8, 9]),
        ("0-1, 5,8-", [0, 1, 5, 8, 9]),
    ],
)
def test_parts(part, places):
    found, rest = split("t", KEYS, part, "0-", allow_same_items=True)
    assert found == [f"t/{place}" for place in places]
    assert rest == KEYS


@pytest.mark.parametrize("part", ["some", "", "-3", "1-x", "even,odd"])
def test_what_is_no_part(part):
    with pytest.raises(InputError, match="names no items; expected even, odd, or places such as 0-99,150-"):
        split("t", KEYS, part, "odd", allow_same_items=False)


def test_parts_without_items_and_parts_that_overlap():
    with pytest.raises(InputError, match="t has no items in 10-: it has 10, with places from 0"):
        split("t", KEYS, "even", "10-", allow_same_items=False)
    with pytest.raises(InputError, match="2 items of t are in --select-on 0-3 and in --report-on 2-: "):
        split("t", KEYS, "0-3", "2-", allow_same_items=False)


@pytest.mark.parametrize("rising", [True, False])
def test_the_best_by_its_direction(rising):
    # On the even items a has more than b, on the odd ones b has more.
    values = {"plain": [0] * 10, "a": [1, 0] * 5, "b": [0, 1] * 5}
    about = settings({"t": {"m": metric(rising=rising), "beside": metric(primary=False)}}, list(values))
    found = select(scored(about, {"t": answers("t", "m", values)}, {}), on="even", report_on="odd")
    (chosen,) = found.chosen
    assert (chosen.variant, chosen.value) == (("a", 1.0) if rising else ("b", 0.0))
    assert (chosen.selected_on, chosen.same_items, chosen.change.base) == (5, False, "plain")
    # It is judged on the odd ones, as all figures are.
    assert chosen.change.comparison.difference == (0.0 if rising else 1.0)
    assert {score.variant: score.value for score in found.scores} == {"plain": 0.0, "a": 0.0, "b": 1.0}
    assert found.notes == ("Chosen on the items even, judged on odd; all figures are of odd.",)


def test_nothing_to_choose_from():
    about = settings({"t": {"m": metric()}}, ["plain"])
    found = select(scored(about, {"t": answers("t", "m", {"plain": [1, 0]})}, {}), on="even", report_on="odd")
    assert found.chosen == ()
    assert [score.n for score in found.scores] == [1]


def run(directory, variant, places, *, task="t", prompt="", value=1):
    about = settings({task: {"m": metric()}}, [variant])
    return write(directory, about, [answer(task, variant, i, prompt=prompt, m=[value, 1]) for i in places])


def test_two_runs_on_what_both_answered(tmp_path):
    first, second = run(tmp_path / "a", "plain", range(12)), run(tmp_path / "b", "mask", range(10, 1, -1), value=0)
    found = compare_runs(first, second)
    (change,) = found.changes
    assert (change.base, change.variant) == (f"plain ({first})", f"mask ({second})")
    assert (change.comparison.n, change.comparison.losses) == (9, 9)
    assert list(found.answers["t"][change.base]) == [f"t/{place}" for place in range(2, 11)]  # in their order
    assert list(found.settings["shared"]["runs"]) == [str(first), str(second)]
    # A run is found by its file, too.
    assert compare_runs(first / "eval.jsonl", second).changes[0].comparison == change.comparison


def test_items_that_were_asked_in_other_words(tmp_path):
    first = run(tmp_path / "a", "plain", range(4))
    second = run(tmp_path / "b", "mask", range(2))
    other = run(tmp_path / "c", "mask", range(2), prompt="other words")
    both = write(
        tmp_path / "d",
        settings({"t": {"m": metric()}}, ["mask"]),
        [answer("t", "mask", 0, m=[1, 1]), answer("t", "mask", 1, prompt="other words", m=[1, 1])],
    )
    assert compare_runs(first, second).notes == ()
    assert compare_runs(first, both).notes == ("t: 1 items were asked in other words and are left out.",)
    with pytest.raises(InputError, match="have no items in common that were asked in the same words. Give runs of"):
        compare_runs(first, other)
    with pytest.raises(InputError, match="have no items in common"):
        compare_runs(first, run(tmp_path / "e", "mask", range(4), task="another"))
