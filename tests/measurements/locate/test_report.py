"""The section on where the massive activation is."""

import dataclasses
import re

import numpy as np
import pytest

import hand_made
from hand_made import HOSTILE
from melayer.measurements.locate.figures import MassiveDim, MassiveScalar
from melayer.measurements.locate.report import section
from melayer.presentation.figures import ORANGE, label
from rendering import checked


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.located()))


def test_every_part_is_there(parts):
    made = section(hand_made.located())
    assert (made.key, made.title, made.answer) == ("locate", "Where it is", hand_made.located().sentence)
    assert list(parts) == [
        "magnitudes", "shares", "tokens", "surface", "Stages", "Massive scalars at the ME layer",
        "Massive scalars at every block", "Texts", "Every block",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "takeaway"),
    [
        (
            "magnitudes",
            "After block 1 the largest value is 2,000 times the one before it; the criterion holds after 2 of 4 blocks "
            "in at least one text.",
        ),
        (
            "shares",
            "Block 1 writes 96.0% of the peak state (97.0% by its FFN); the largest removal is 98.0%, at block 3.",
        ),
        (
            "tokens",
            f"In text 0, of its first 2 tokens, token 0 (“{HOSTILE}”) holds the largest value, 4,100 at block 2, 2,050 "
            "times the largest other token.",
        ),
        (
            "surface",
            f"At its peak, after block 2, dimension 5 of token 0 (“{HOSTILE}”) alone holds 100.0% of its squared norm.",
        ),
        ("Stages", "Emergence: single; this one block creates it."),
        (
            "Massive scalars at the ME layer",
            "2 scalars meet the criterion over all texts and blocks, in 1 dimension (5).",
        ),
        ("Texts", "The criterion holds at the ME layer in 1 of 2 texts."),
    ],
)
def test_takeaways_are_computed(parts, key, takeaway):
    assert parts[key].takeaway == takeaway


def test_the_magnitudes(parts):
    largest, median, criterion = parts["magnitudes"].figure["data"]
    assert largest["y"] == [2.0, 4000.0, 4100.5, 30.0]
    assert median["y"] == [0.5] * 4
    assert criterion["y"] == [500.0] * 4  # 1000 medians, more than 100
    assert largest["text"][1] == f"block 1<br>token 0 “{label(HOSTILE)}”, dimension 5<br>text 0"
    layout = parts["magnitudes"].figure["layout"]
    assert [(line["x0"], line["line"]["color"]) for line in layout["shapes"]] == [(1, ORANGE)]
    assert [note["text"] for note in layout["annotations"]] == ["ME layer 1"]


def test_the_shares_add_up(parts):
    ffn, attention, other = parts["shares"].figure["data"]
    assert [trace["name"] for trace in (ffn, attention, other)] == ["FFN", "attention", "other mixer"]
    total = np.sum([trace["y"] for trace in (ffn, attention, other)], axis=0)
    np.testing.assert_allclose(total, [stage.share for stage in hand_made.located().shares], atol=1e-4)
    assert other["y"][2] == pytest.approx(0.004)  # block 2 has no attention to name


def test_without_another_mixer_there_is_no_bar_for_it():
    shares = tuple(dataclasses.replace(stage, attn_share=0.0) for stage in hand_made.located().shares)
    parts = checked(section(dataclasses.replace(hand_made.located(), shares=shares)))
    assert [trace["name"] for trace in parts["shares"].figure["data"]] == ["FFN", "attention"]


def test_tokens_by_blocks(parts):
    (squares,) = parts["tokens"].figure["data"]
    assert squares["y"] == [f"0 {label(HOSTILE)}", "1 one"]
    np.testing.assert_allclose(squares["z"][0], np.log10([2, 4000, 4100.5, 30]), rtol=1e-2)


def test_wide_models_are_binned_in_three_dimensions():
    result = hand_made.located()
    states = np.zeros((4, 2000), np.float32)
    states[2, 1501] = -4100.5
    trace = dataclasses.replace(result.trace, states=states)
    plot = checked(section(dataclasses.replace(result, trace=trace)))["surface"]
    (landscape,) = plot.figure["data"]
    assert landscape["x"] == list(range(0, 2000, 3))
    assert landscape["z"][2][1501 // 3] == 4100.0
    assert plot.reading.endswith("Each column is the maximum of 3 neighbouring dimensions.")
    assert "dimension 1501" in plot.takeaway


def test_the_tables(parts):
    assert parts["Stages"].rows == [
        ["adds", 1, "96.0%", "-1.0%", "97.0%", "4,000", "8,000"],
        ["erases", 3, "-98.0%", "0.0%", "-98.0%", "30", "60"],
    ]
    assert parts["Massive scalars at the ME layer"].rows == [[1, 0, 0, HOSTILE, 5, "-4,000.0"]]
    assert len(parts["Massive scalars at every block"].rows) == 2
    assert parts["Texts"].rows[1] == [1, "two", 3, "two", "too short", "no", "—", "—"]
    assert [row[1] for row in parts["Every block"].rows] == ["2.0", "4,000.0", "4,100.5", "30.0"]


def many(n: int, at: int, dims: int) -> dict:
    """`n` scalars of `dims` dimensions at one block, of which all are listed."""
    result = hand_made.located()
    blocks = tuple(dataclasses.replace(row, n_massive=n if row.layer == at else 0) for row in result.blocks)
    return {
        "massive": tuple(MassiveScalar(at, 0, place, "w", place % dims, 200.0) for place in range(n)),
        "massive_dims": tuple(MassiveDim(at, dim, n // dims, 200.0) for dim in range(dims)),
        "blocks": blocks,
    }


def test_long_lists_are_cut_and_say_so():
    parts = checked(section(dataclasses.replace(hand_made.located(me_layer=None), **many(500, 2, 10))))
    table = parts["Massive scalars, 400 of 500"]
    assert len(table.rows) == 400
    assert "in 10 dimensions (0, 1, 2, 3, 4, 5, 6, 7…)." in table.takeaway
    parts = checked(section(dataclasses.replace(hand_made.located(), **many(500, 1, 10))))
    assert "Massive scalars at the ME layer, 400 of 500" in parts
    assert "Massive scalars at every block, 400 of 500" in parts


def test_a_list_that_locate_cut_says_so_too():
    given = many(97, 1, 3)
    given["massive"] = given["massive"][:76]
    parts = checked(section(dataclasses.replace(hand_made.located(), **given)))
    table = parts["Massive scalars at the ME layer, 76 of 97"]
    assert len(table.rows) == 76
    assert table.takeaway == "97 scalars meet the criterion over all texts and blocks, in 3 dimensions (0, 1, 2)."


def test_what_is_not_finite_is_no_number_on_the_page():
    result = hand_made.located()
    states, token_max = result.trace.states.copy(), result.trace.token_max.copy()
    states[3], token_max[3] = np.inf, np.inf
    states[2, 1], token_max[2, 1] = np.nan, np.nan
    blocks = tuple(
        dataclasses.replace(row, max_abs=None, median_abs=None, ratio=None, top_norm=None) for row in result.blocks
    )
    trace = dataclasses.replace(result.trace, states=states, token_max=token_max)
    parts = checked(section(dataclasses.replace(result, trace=trace, blocks=blocks)))
    for part in parts.values():
        words = " ".join([part.title, part.takeaway, str(getattr(part, "rows", ""))])
        assert not re.search(r"\b(nan|inf|None)\b|\d{13}", words), words
    everywhere = dataclasses.replace(trace, states=states * np.nan, token_max=token_max * np.nan)
    checked(section(dataclasses.replace(result, trace=everywhere, blocks=blocks)))


def test_nothing_massive():
    result = dataclasses.replace(
        hand_made.located(me_layer=None), shares=(), stages=(), erased_at=(), massive=(), trace=None
    )
    parts = checked(section(result))
    assert list(parts) == ["magnitudes", "Stages", "Massive scalars", "Texts", "Every block"]
    assert parts["magnitudes"].takeaway == result.sentence
    assert parts["magnitudes"].figure["layout"]["shapes"] == []
    assert parts["Massive scalars"].takeaway == "No scalar meets the criterion."
    assert parts["Texts"].takeaway == ""
