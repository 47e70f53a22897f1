"""The page of a scan."""

import dataclasses
import json
import math

import pytest

import hand_made
from hand_made import HOSTILE
from melayer.census.report import FP16_MAX, section, write_scan_report
from rendering import checked

LOSSES = "Relative error of ordinary tokens: median over blocks and worst block"


def with_total(**changes):
    result = hand_made.scanned()
    return dataclasses.replace(result, total=dataclasses.replace(result.total, **changes))


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.scanned()))


def test_every_part_is_there(parts):
    made = section(hand_made.scanned())
    assert (made.key, made.title, made.answer) == ("scan", "How large activations get", hand_made.scanned().sentence)
    assert list(parts) == [
        "scan-census", "scan-map", "scan-histogram", "Overflow in float16", "scan-losses", LOSSES,
        "Which tokens become massive", "scan-growth", f"Category {HOSTILE}", "Every site at its largest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "takeaway"),
    [
        (
            "scan-census",
            "The largest is in block_out of block 1. It is 8,750 times what 99.99 % of the values there stay under.",
        ),
        ("scan-map", "The ME layer is block 1."),
        ("scan-histogram", "After block 1 half of the values are below 0.250 and the largest is 70,000.0."),
        (
            "Overflow in float16",
            "2 values would become infinite in float16; the model needs bfloat16 or float32 there.",
        ),
        (
            "scan-losses",
            "The worst input is attn_in of block 1: with one scale for a sequence int8 loses 51.0% of its ordinary "
            "tokens' norm, and 3.0% where the scale comes from the ordinary tokens alone.",
        ),
        (
            "Which tokens become massive",
            "Of 1,300 massive tokens 69.2% are the first of their sequence, 23.1% are later delimiters and 7.7% "
            "something else.",
        ),
        ("scan-growth", "In block_out, 600 documents would have shown 50.0% of the maximum of all 1,200."),
        (f"Category {HOSTILE}", "10 documents, 120 tokens."),
    ],
)
def test_takeaways_are_computed(parts, key, takeaway):
    assert parts[key].takeaway == takeaway


def test_the_whiskers_reach_the_lower_end_of_the_interval(parts):
    (bars,) = parts["scan-census"].figure["data"]
    assert (bars["x"], bars["y"]) == (["embedding", "block_out 1"], [0.5, 70000.0])
    assert (bars["error_y"]["array"], bars["error_y"]["arrayminus"]) == ([0, 0], [0.25, 35000.0])
    (line,) = parts["scan-census"].figure["layout"]["shapes"]
    assert line["y0"] == FP16_MAX
    far_below = with_total(places=hand_made.scanned().total.places[:2])
    assert checked(section(far_below))["scan-census"].figure["layout"]["shapes"] == []


def test_the_map_is_of_powers_of_ten(parts):
    (squares,) = parts["scan-map"].figure["data"]
    assert (squares["x"], squares["y"], squares["text"]) == ([0, 1], ["block_out"], [[2.0, 70000.0]])
    assert squares["z"] == [[pytest.approx(math.log10(2), abs=1e-4), pytest.approx(math.log10(7e4), abs=1e-3)]]


def test_the_histogram_has_a_column_a_doubling(parts):
    (squares,) = parts["scan-histogram"].figure["data"]
    assert squares["x"] == [2.0**power for power in range(-2, 12)]  # 0.3 is above 1/4, and 4,100 above 2,048
    assert squares["y"] == [0, 1]
    assert [row[0] for row in squares["z"]] == [pytest.approx(math.log10(0.999), rel=1e-3)] * 2
    assert [row[-1] for row in squares["z"]] == [-3.0] * 2
    assert all(value is None for row in squares["z"] for value in row[1:-1])


def test_without_block_outputs_there_is_no_histogram():
    total = hand_made.scanned().total
    census = dataclasses.replace(total.census, places=())
    parts = checked(section(with_total(census=census)))
    assert "scan-histogram" not in parts
    assert "scan-map" in parts


def test_the_worst_input_of_each_block_is_drawn(parts):
    curves = {trace["name"]: trace for trace in parts["scan-losses"].figure["data"]}
    assert list(curves) == [
        "one scale a tensor",
        "one scale a tensor, masked",
        "one scale a tensor without massive",
        "one scale a tensor without massive, masked",
        "one scale a token",
        "one scale a token, masked",
    ]
    assert (curves["one scale a tensor"]["x"], curves["one scale a tensor"]["y"]) == ([0, 1], [0.5, 0.51])
    assert curves["one scale a token, masked"]["line"]["dash"] == "dot"
    assert parts[LOSSES].rows[0] == ["int8", "tensor", "attn_in", "50.50%", "51.00%", 1, "50.50%", "51.00%", 1]


def test_an_error_that_is_not_known_is_left_out():
    losses = tuple(
        dataclasses.replace(loss, error=None) if loss.layer == 0 or loss.variant == "masked" else loss
        for loss in hand_made.scanned().total.losses
    )
    parts = checked(section(with_total(losses=losses)))
    curves = {trace["name"]: trace["x"] for trace in parts["scan-losses"].figure["data"]}
    assert curves["one scale a tensor"] == [1]
    assert curves["one scale a tensor, masked"] == []
    assert parts[LOSSES].rows[0][3:] == ["51.00%", "51.00%", 1, "—", "—", "—"]


def test_the_growth_of_sites_with_more_than_one_document(parts):
    (curve,) = parts["scan-growth"].figure["data"]
    assert (curve["name"], curve["x"], curve["y"]) == ("block_out", [1, 600, 1200], [100.0, 35000.0, 70000.0])


def test_one_document_shows_no_growth():
    parts = section(with_total(growth={"block_out": ((1, 5.0),)})).parts
    (plot,) = (part for part in parts if getattr(part, "key", None) == "scan-growth")
    assert plot.takeaway == "One document alone does not show how the maximum grows."
    assert plot.figure["data"] == []


def test_nothing_massive_and_nothing_too_large():
    total = hand_made.scanned().total
    nothing = {"massive": (), "n_massive_first": 0, "n_massive_delimiters": 0, "n_massive_words": 0, "me_layer": None}
    parts = checked(section(with_total(places=total.places[:2], losses=(), **nothing)))
    assert parts["scan-map"].takeaway == "There is no ME layer."
    assert parts["Overflow in float16"].takeaway == "No value would overflow float16."
    assert parts["Which tokens become massive"].takeaway == "No token is massive at any block's output."
    assert "scan-losses" not in parts


def test_what_is_not_finite_has_no_bar():
    total = hand_made.scanned().total
    broken = dataclasses.replace(total.places[2], max_abs=None, interval=None, variance=None, kurtosis=None)
    parts = checked(section(with_total(places=(*total.places[:2], broken))))
    assert parts["scan-census"].figure["data"][0]["x"] == ["embedding"]
    assert parts["scan-map"].figure["data"][0]["z"] == [[pytest.approx(0.301, abs=1e-3), None]]
    assert parts["scan-histogram"].takeaway == "After block 1 half of the values are below 0.250."
    assert parts["Every site at its largest"].rows[1][2:4] == ["—", "—"]


def test_the_page(tmp_path):
    written = write_scan_report(hand_made.scanned(), tmp_path)
    html = written.html.read_text(encoding="utf-8")
    assert "<td>corpus.jsonl, 5,000 bytes in 2 files: 1,200 documents, 20,000 tokens</td>" in html
    assert "<td>1,300 of at most 16 tokens</td>" in html
    assert "<td>12 s in 2 processes</td>" in html
    assert json.loads(written.json.read_text())["scan"]["total"]["me_layer"] == 1


def test_a_split_of_a_hub_data_set_is_named(tmp_path):
    result = hand_made.scanned()
    settings = {**result.settings, "data": {"source": "hub/name", "split": "train"}}
    written = write_scan_report(dataclasses.replace(result, settings=settings, n_processes=1), tmp_path)
    html = written.html.read_text(encoding="utf-8")
    assert "<td>hub/name, split train: 1,200 documents, 20,000 tokens</td>" in html
    assert "12 s in 1 process<" in html
