"""A locate result at a terminal, to the letter."""

import dataclasses

import pytest

import hand_made
from melayer.measurements.locate.figures import MassiveScalar
from melayer.measurements.locate.table import show_locate
from rendering import printed

EXPECTED = """
The ME layer is block 1 of 4 (0-based): there token 0 (“[red]<b>:x:</b>[/]”) reaches |h| = 4,000 in
dimension 5, 8,000 times the median; this one block creates it, and it is erased at block 3.
A note on [red]<b>:x:</b>[/].

Blocks
block max |h| ratio token                    dim massive texts  share
    0     2.0     4     0 [red]<b>:x:</b>[/]   5       0   0/1  +0.1%
    1 4,000.0 8,000     0 [red]<b>:x:</b>[/]   5       1   1/1 +96.0% <- ME layer
    2 4,100.5 8,201     0 [red]<b>:x:</b>[/]   5       1   1/1  +2.4%
    3    30.0    60     0 [red]<b>:x:</b>[/]   5       0   0/1 -98.0% erases

Emergence: single
block         share attention    FFN
    1 adds   +96.0%     -1.0% +97.0%
    3 erases -98.0%      0.0% -98.0%

Massive scalars at block 1
block text token                    dim    value
    1    0     0 [red]<b>:x:</b>[/]   5 -4,000.0

Texts
text tokens holds     massive token         first token        begins
   0      9 yes       0: [red]<b>:x:</b>[/] [red]<b>:x:</b>[/] [red]<b>:x:</b>[/] one
   1      3 too short -                     two                two
[red]<b>:x:</b>[/], float32, fingerprint 0123; 12 tokens in 2 texts, 0 of them with BOS. Blocks,
tokens and dimensions are 0-based.
"""


def test_what_is_printed():
    assert printed(show_locate, hand_made.located()) == EXPECTED.strip("\n")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_ever_cut(width):
    result = hand_made.located()
    short = dataclasses.replace(result, blocks=tuple(dataclasses.replace(row, token="X") for row in result.blocks))
    lines = printed(show_locate, short, width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    row = next(line for line in lines if "<- ME layer" in line)
    assert row.split() == [
        "1", "4,000.0", "8,000", "0", "X", "5", "1", "1/1", "+96.0%", "<-", "ME", "layer",
    ]  # fmt: skip


def test_nothing_massive_makes_short_tables():
    result = dataclasses.replace(
        hand_made.located(me_layer=None), shares=(), stages=(), erased_at=(), massive=(), notes=()
    )
    lines = printed(show_locate, result).splitlines()
    assert not any(line.startswith(("Emergence", "Massive scalars")) for line in lines)
    assert not any("ME layer" in line for line in lines[3:])
    row = next(line for line in lines if line.startswith("    1 4,000.0"))
    assert row.split()[-1] == "-"


def test_what_is_not_finite_is_said():
    result = hand_made.located()
    broken = dataclasses.replace(result.blocks[2], max_abs=None, ratio=None, n_non_finite=3)
    blocks = (*result.blocks[:2], broken, result.blocks[3])
    row = next(
        line for line in printed(show_locate, dataclasses.replace(result, blocks=blocks)).splitlines()
        if line.startswith("    2 ")
    )  # fmt: skip
    assert row.split()[:3] == ["2", "-", "-"]
    assert row.endswith("3 tokens not finite")


def test_of_many_scalars_the_first_are_listed():
    massive = tuple(MassiveScalar(1, 0, place, "w", 5, 200.0 + place) for place in range(20))
    blocks = tuple(
        dataclasses.replace(row, n_massive=97 if row.layer == 1 else 0) for row in hand_made.located().blocks
    )
    text = printed(show_locate, dataclasses.replace(hand_made.located(), massive=massive, blocks=blocks))
    assert "Massive scalars at block 1, 12 of 97" in " ".join(text.split())
    assert text.count("211.0") == 1
    assert "212.0" not in text
