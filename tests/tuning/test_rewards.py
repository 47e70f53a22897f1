"""Rewards: right answers get 1, and nothing that is not an answer does."""

import pytest

from melayer.tuning.rewards import answer_format, correctness, final_answer, is_gold


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 1,000", "1000"),
        ("#### $18", "18"),
        ("#### 18 dollars", "18"),
        ("First #### 3, no:\n#### 4", "4"),
        ("so \\boxed{42}", "42"),
        ("so \\boxed{7} or rather \\boxed{42}", "42"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\sqrt{2}}", "\\sqrt{2}"),
        ("The answer is 1,000.", "1000"),
        ("#### -3", "-3"),
    ],
)
def test_right(completion, gold):
    assert correctness([completion], [gold]) == [1.0]
    assert correctness([[{"role": "assistant", "content": completion}]], [gold]) == [1.0]


@pytest.mark.parametrize(
    "completion",
    ["", " ", "####", "#### ", "\\boxed{}", "\\boxed{ }", "\\boxed{42", "I do not know.", "0", "#### 41", "\\boxed{4}",
     "#### 41 or maybe 40", "42\n#### 7", "42 \\boxed{7}", "{" * 200, "1e400"],
)  # fmt: skip
def test_wrong(completion):
    assert correctness([completion], ["42"]) == [0.0]


def test_a_constant_is_right_only_where_it_is_right():
    gold = ["10", "11", "12", "10"]
    assert correctness(["#### 10"] * 4, gold) == [1.0, 0.0, 0.0, 1.0]


def test_a_root_is_no_number_under_it():
    assert correctness(["\\boxed{2}", "\\boxed{\\sqrt{3}}"], ["\\sqrt{2}"] * 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("#### 4", 1), ("so\n#### 1,234.5", 1), ("so\n  #### $4 \n", 1), ("so #### 4", 0), ("#### 4\nDone.", 0),
     ("#### 3\n#### 4", 0), ("#### four", 0), ("####", 0), ("", 0), ("4", 0)],
)  # fmt: skip
def test_format(completion, reward):
    assert answer_format([completion]) == [reward]


def test_the_part_that_is_the_answer():
    assert final_answer("a #### 4 \nb") == "4"
    assert final_answer("\\boxed{\\frac{1}{2}} is it") == "\\frac{1}{2}"
    assert final_answer("no mark") == "no mark"


def test_golds():
    assert is_gold("4")
    assert is_gold("\\frac{1}{2}")
    assert not is_gold("")
    assert not is_gold(" ")
