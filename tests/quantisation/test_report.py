"""The page of a quantisation check."""

import dataclasses
import json
import math

import pytest

import hand_made
from hand_made import HOSTILE
from melayer.presentation.figures import label
from melayer.quantisation.report import section, write_quant_report
from melayer.quantisation.result import PerplexityScore
from rendering import checked

CHANGES = "What baking and the mask change (each interval stands alone: of twenty one leaves out 0 by chance)"


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.quantised()))


def test_every_part_is_there(parts):
    made = section(hand_made.quantised())
    assert (made.key, made.title, made.answer) == (
        "quant-check",
        "What quantised activations cost",
        hand_made.quantised().sentence,
    )
    assert list(parts) == ["quant-perplexity", CHANGES, "quant-errors", "The figures of every setting"]


def test_takeaways_are_computed(parts):
    assert parts["quant-perplexity"].takeaway == (
        "int8 per-tensor plain costs +1.000 nats a token; baking: gives back (-0.750)."
    )
    assert parts["quant-errors"].takeaway == (
        "With int8 per-tensor plain the worst are block 0 self_attn.q_proj (50.0%)."
    )


def test_the_bars_and_their_whiskers(parts):
    bars = parts["quant-perplexity"].figure["data"]
    assert [(bar["name"], bar["y"], bar["visible"]) for bar in bars] == [
        ("plain", [20.09], True),
        ("baked", [9.49], True),
        ("plain", [None], False),
        ("baked", [9.49], False),
    ]
    # The cost's interval, 0.5 to 1.5 nats above the unquantised 2.
    up, down = (bars[0]["error_y"][side][0] for side in ("array", "arrayminus"))
    assert 20.09 + up == pytest.approx(math.exp(3.5), rel=1e-4)
    assert 20.09 - down == pytest.approx(math.exp(2.5), rel=1e-4)
    assert bars[1]["error_y"]["array"] == [None]  # a single sequence has no interval


def test_the_menu_chooses_the_format(parts):
    layout = parts["quant-perplexity"].figure["layout"]
    buttons = layout["updatemenus"][0]["buttons"]
    assert [(button["label"], button["args"][0]["visible"]) for button in buttons] == [
        ("int8", [True, True, False, False]),
        ("int4", [False, False, True, True]),
    ]
    assert [line["y0"] for line in layout["shapes"]] == [7.39]


def test_one_format_needs_no_menu_and_no_treatment_no_table_of_changes():
    result = hand_made.quantised(formats=("int8",))
    assert checked(section(result))["quant-perplexity"].figure["layout"]["updatemenus"] == []
    plain = dataclasses.replace(result, rows=result.rows[:1], settings={**result.settings, "treatments": ["plain"]})
    parts = checked(section(plain))
    assert CHANGES not in parts
    assert parts["quant-perplexity"].takeaway == "int8 per-tensor plain costs +1.000 nats a token."


def test_an_unquantised_model_that_is_not_finite_has_no_line():
    result = dataclasses.replace(hand_made.quantised(), unquantised=PerplexityScore(None, None, ()))
    plot = checked(section(result))["quant-perplexity"]
    assert plot.figure["layout"]["shapes"] == []
    assert plot.figure["data"][0]["error_y"]["array"] == [None]
    assert "the unquantised model (not finite)" in plot.reading


def test_the_errors_of_each_setting(parts):
    figure = parts["quant-errors"].figure
    assert figure["data"][0]["x"] == ["self_attn.q_proj", label(HOSTILE)]
    assert [squares["z"] for squares in figure["data"][:2]] == [
        [[50.0, None], [None, None], [None, None], [None, None]],
        [[1.0, None], [None, 12.5], [None, None], [None, None]],
    ]
    assert [squares["visible"] for squares in figure["data"]] == [True, False, False, False]
    assert [button["label"] for button in figure["layout"]["updatemenus"][0]["buttons"]] == [
        row.label for row in hand_made.quantised().rows
    ]


def test_the_tables(parts):
    assert parts[CHANGES].rows == [["int8", "per-tensor", "baking", "-0.750", "-1.000 to -0.500", "gives back"]]
    rows = parts["The figures of every setting"].rows
    assert rows[0][3:] == ["20.09", "+1.0000", "+0.5000 to +1.5000", "block 0 self_attn.q_proj 50.0%"]
    assert rows[2][3:6] == ["not finite", "—", "—"]


@pytest.mark.parametrize("mask", [None, {"selector": "weight", "rate": 0.5, "strength": 1.0}])
def test_the_page(mask, tmp_path):
    result = hand_made.quantised()
    result = dataclasses.replace(result, settings={**result.settings, "mask": mask})
    written = write_quant_report(result, tmp_path)
    html = written.html.read_text(encoding="utf-8")
    assert "<td>given: 4 sequences of T = 16</td>" in html
    assert f"<th>Mask</th><td>{'none' if mask is None else 'weight 0.5, strength 1'}</td>" in html
    assert "<th>Prefix</th><td>[7]</td>" in html
    assert json.loads(written.json.read_text())["quant_check"]["T"] == 16
