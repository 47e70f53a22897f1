"""Answers side by side at a terminal, to the letter."""

import dataclasses
import io

from rich.console import Console

import hand_made
from melayer.interventions.mask import WeMask
from melayer.studies.answers.table import live_answers, show_answers
from rendering import printed

EXPECTED = """
[red]<b>:x:</b>[/]
plain                         masked
yes                           yes
The answers are the same.
Why?
plain                         masked
because [red]<b>:x:</b>[/]    no
They differ from generated token 1 on (0-based).
The mask leaves 1 of 2 answers as they are. Mask: weight
0.5, strength 1, blocks: 2-3, 5 (0-based).
[red]<b>:x:</b>[/], float32, fingerprint 0123.
"""


def test_what_is_printed():
    assert printed(show_answers, hand_made.answered(), width=60) == EXPECTED.strip("\n")


def test_what_is_cut_off_is_said():
    result = hand_made.answered()
    first, second = result.answers
    cut = dataclasses.replace(second, plain_cut=True, masked_cut=True)
    settings = {**result.settings, "max_new_tokens": 7}
    text = printed(show_answers, dataclasses.replace(result, answers=(first, cut), settings=settings), width=200)
    assert "They differ from generated token 1 on (0-based). Cut off at 7 tokens: plain and masked." in text
    assert "At 7 tokens 1 plain and 1 masked answers were cut off; raise --max-new-tokens" in text
    assert "The answers are the same.\n" in text


def test_a_mask_of_all_blocks():
    result = dataclasses.replace(hand_made.answered(), mask=WeMask(rate=1.0, me_layer=1, selector="random"))
    text = " ".join(printed(show_answers, result).split())
    assert "Mask: random 1, strength 1, blocks: every block after 1 (0-based)." in text


def test_answers_grow_as_they_are_streamed():
    file = io.StringIO()
    with live_answers(["Why?", "[/]"], Console(file=file, width=60, force_terminal=True)) as stream:
        for at, side, piece in ((0, "plain", "be"), (0, "plain", "cause"), (0, "masked", "no"), (1, "masked", "[/]")):
            stream(at, side, piece)
    states = file.getvalue().split("Why?")[1:]
    assert "because" not in states[0]
    assert "because" in states[1]
    assert "because" in states[2]
    assert "no" in states[2].partition("masked")[2]
    assert "[/]" in states[-1]
