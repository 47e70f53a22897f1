"""The section on what masks of every size do."""

import dataclasses

import pytest

import hand_made
from melayer.presentation.figures import GREY
from melayer.studies.sweep.report import section
from rendering import checked

TABLE = "The figures of every mask"


def without(result, **changes):
    """The result with these figures of every point."""
    plain, *masked = (dataclasses.replace(point, **changes) for point in result.points)
    return dataclasses.replace(result, plain=plain, masked=tuple(masked))


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.swept()))


def test_every_part_is_there(parts):
    made = section(hand_made.swept())
    assert (made.key, made.title, made.answer) == (
        "sweep",
        "What masks of every size do",
        hand_made.swept().sentence,
    )
    assert list(parts) == ["sweep-perplexity", "sweep-sinks", "sweep-both", "sweep-heads", "sweep-cosine", TABLE]


@pytest.mark.parametrize(
    ("key", "takeaway"),
    [
        (
            "sweep-perplexity",
            "It is 10.00 without a mask, lowest with random 0.5 (10.00, 0.0%) and highest with weight 1 (1,234.50, "
            "+12245.0%, 95 % interval +10091.2% to +14854.0%).",
        ),
        (
            "sweep-sinks",
            "The sink rate is 80.0% without a mask; it is lowest with weight 1 (10.0%) and highest with plain (80.0%).",
        ),
        (
            "sweep-both",
            "1 of 3 masks have fewer sinks than the model without a mask at a perplexity at most 5 % above its own.",
        ),
        (
            "sweep-heads",
            "After the ME layer token 0 draws 60.0% of the attention without a mask, and of all masks least with "
            "weight 1 (7.5%).",
        ),
        (
            "sweep-cosine",
            "From the ME layer until the state is erased the mean cosine is 0.9999 without a mask and at least 0.9950 "
            "with one (weight 0.5).",
        ),
    ],
)
def test_takeaways_are_computed(parts, key, takeaway):
    assert parts[key].takeaway == takeaway


def test_curves_begin_at_the_plain_model(parts):
    curves = {trace["name"]: (trace["x"], trace["y"]) for trace in parts["sweep-perplexity"].figure["data"]}
    assert curves == {
        "weight": ([0.0, 0.5, 1.0], [10.0, 10.25, 1234.5]),
        "random": ([0.0, 0.5], [10.0, 10.0]),
        "no mask": ([0, 1.0], [10.0, 10.0]),
    }
    sinks = {trace["name"]: trace["y"] for trace in parts["sweep-sinks"].figure["data"]}
    assert sinks == {"weight": [80.0, 40.0, 10.0], "random": [80.0, 80.0], "no mask": [80.0, 80.0]}


def test_the_plain_model_is_a_star_among_the_masks(parts):
    weight, random, plain = parts["sweep-both"].figure["data"]
    assert (weight["x"], weight["y"], weight["text"]) == ([40.0, 10.0], [10.25, 1234.5], ["weight 0.5", "weight 1"])
    assert random["line"]["width"] == 1
    assert (plain["name"], plain["x"], plain["y"], plain["marker"]["symbol"]) == ("no mask", [80.0], [10.0], "star")


def test_one_menu_entry_a_mask(parts):
    labels = [point.label for point in hand_made.swept().points]
    for key in ("sweep-heads", "sweep-cosine"):
        figure = parts[key].figure
        assert [trace["visible"] for trace in figure["data"]] == [True, False, False, False]
        assert [button["label"] for button in figure["layout"]["updatemenus"][0]["buttons"]] == labels
    heads, cosine = (parts[key].figure for key in ("sweep-heads", "sweep-cosine"))
    assert heads["data"][1]["z"][3] == [40.0, 20.0]
    assert heads["data"][1]["hovertemplate"].startswith("weight 0.5, block")
    assert cosine["data"][2]["y"] == [0.25, None, 0.125]
    assert cosine["data"][0]["line"] == {"color": GREY, "width": 2}
    # One range for all masks, so that switching moves nothing but the line.
    assert cosine["layout"]["yaxis"]["range"] == pytest.approx([0.105, 1.02])


def test_the_figures(parts):
    plain, weight, most, same = parts[TABLE].rows
    assert plain[:7] == ["plain", "10.00", "9.00 to 11.25", "—", "—", "—", "—"]
    assert plain[7:] == ["40.0%", "80.0%", "0.9999", "1.5", "5.5", "—", "—"]
    assert weight[3:7] == ["+2.5%", "-8.1% to +14.4%", "+0.0247", "-0.0849 to +0.1343"]
    assert (most[0], most[1], most[3], most[9]) == ("weight 1", "1,234.50", "+12245.0%", "—")
    assert same[3:7] == ["0.0%", "—", "+0.0000", "—"]  # no sequence differs: there is no spread


def test_bars_are_the_intervals_around_the_plain_model(parts):
    weight, random, plain = parts["sweep-perplexity"].figure["data"]
    assert weight["error_y"]["array"] == [0.0, pytest.approx(10 * 1.1437 - 10.25, abs=1e-2), pytest.approx(260.9)]
    assert weight["error_y"]["arrayminus"] == [0.0, pytest.approx(10.25 - 10 * 0.9186, abs=1e-2), pytest.approx(215.38)]
    assert "error_y" not in random
    assert "error_y" not in plain


def test_the_plain_model_alone():
    parts = checked(section(dataclasses.replace(hand_made.swept(), masked=())))
    assert list(parts) == ["sweep-heads", "sweep-cosine", TABLE]
    assert parts["sweep-heads"].takeaway == ("After the ME layer token 0 draws 60.0% of the attention without a mask.")
    assert parts["sweep-cosine"].takeaway.endswith("the mean cosine is 0.9999 without a mask.")


def test_where_nothing_is_behind_the_me_layer():
    result = without(hand_made.swept(), sink_rate_after_me=None, cosine_rigid=None, alpha=((0.5,), (0.5,), None, None))
    parts = checked(section(result))
    assert list(parts) == ["sweep-perplexity", "sweep-heads", "sweep-cosine", TABLE]
    assert parts["sweep-heads"].takeaway == "No block after the ME layer has softmax attention."
    assert parts["sweep-cosine"].takeaway == "No two neighbouring blocks after the ME layer could be compared."
