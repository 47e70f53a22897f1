"""A training run at a terminal, to the letter."""

import dataclasses

import hand_made
from melayer.tuning.table import show_tune
from rendering import printed

EXPECTED = """
3 steps of sft under a mask (weight 0.5): the loss went from 4 to 2.5.
A note on [red]<b>:x:</b>[/].

sft, 3 steps
step   loss gradient
   1 4.0000   2.0000
   2 3.0000        -
   3 2.5000   1.0000
Validation at step 0: loss 3.5
Validation at step 3: loss 2.75
"""


def test_what_is_printed():
    assert printed(show_tune, *hand_made.tuned()) == EXPECTED.strip("\n")


def test_of_many_steps_some_are_shown_and_of_one_evaluation_one():
    result, _ = hand_made.tuned()
    history = [{"step": step, "loss": float(step)} for step in range(1, 101)]
    result = dataclasses.replace(result, validation=result.validation[:1], notes=())
    lines = printed(show_tune, result, history).splitlines()
    rows = [line.split() for line in lines if line[:4].strip().isdigit()]
    assert [row[0] for row in rows] == ["1", "12", "23", "34", "45", "56", "67", "78", "89", "100"]
    assert all(float(step) == float(loss) for step, loss in rows)
    assert sum(line.startswith("Validation") for line in lines) == 1
