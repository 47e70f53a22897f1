"""The section on what attention does with the massive activation."""

import pytest

import hand_made
from melayer.measurements.sinks.report import attention_map, head_axis, section
from melayer.measurements.sinks.result import MassiveKeys
from rendering import checked

NOWHERE = {"me_layer": None, "rate_until_me": None, "rate_after_me": None}


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.sunk()))


def test_every_part_is_there(parts):
    made = section(hand_made.sunk())
    assert (made.key, made.title, made.answer) == ("sinks", "What attention does with it", hand_made.sunk().sentence)
    strongest = "The heads that are sinks in more than half of the sequences"
    assert list(parts) == ["sinks-heads", "sinks-rate", "sinks-massive", strongest]
    assert parts[strongest].rows == [[3, 1, "87.5%", "100%"], [3, 0, "50.0%", "75%"]]
    assert parts[strongest].takeaway == "2 heads, strongest first."


@pytest.mark.parametrize(
    ("key", "takeaway"),
    [
        (
            "sinks-heads",
            "2 of 6 heads are sinks in more than half of the sequences; the strongest is head 1 of block 3, which "
            "gives it 87.5% of its attention.",
        ),
        (
            "sinks-rate",
            "The sink rate is 6.2% up to the ME layer (block 1) and 75.0% after it. It is highest in block 3 (75.0%).",
        ),
        (
            "sinks-massive",
            "5 massive tokens, 1 of them not the first of their sequence, are sinks in 50.0% of all heads, 80.0% after "
            "the ME layer.",
        ),
    ],
)
def test_takeaways_are_computed(parts, key, takeaway):
    assert parts[key].takeaway == takeaway


def test_massive_tokens_that_are_all_first_are_not_shown_twice():
    massive = MassiveKeys(4, 0, ((0.5, 0.5),) * 4, 0.5, None)
    for of in (None, massive):
        assert "sinks-massive" not in checked(section(hand_made.sunk(massive=of)))


def test_without_an_me_layer_and_sinks():
    parts = checked(section(hand_made.sunk(**NOWHERE, heads=())))
    assert parts["sinks-heads"].takeaway == "0 of 6 heads are sinks in more than half of the sequences."
    assert parts["sinks-rate"].takeaway == (
        "There is no ME layer to compare before and after. It is highest in block 3 (75.0%)."
    )
    assert [trace["name"] for trace in parts["sinks-rate"].figure["data"]] == ["sink rate", "mean attention drawn"]
    assert parts["sinks-heads"].figure["layout"]["shapes"] == []
    half = checked(section(hand_made.sunk(rate_after_me=None)))
    assert half["sinks-rate"].takeaway == "It is highest in block 3 (75.0%)."


def test_the_heads(parts):
    (squares,) = parts["sinks-heads"].figure["data"]
    assert squares["z"] == [[12.5, 6.25], [25.0, None], [None, None], [50.0, 87.5]]
    assert (squares["zmin"], squares["zmax"]) == (0, 100)
    (line,) = parts["sinks-heads"].figure["layout"]["shapes"]
    assert (line["y0"], line["y1"]) == (1.5, 1.5)  # under the row of block 1


def test_the_rates(parts):
    curves = {trace["name"]: (trace["x"], trace["y"]) for trace in parts["sinks-rate"].figure["data"]}
    assert curves == {
        "sink rate": ([0, 1, 2, 3], [0.0, 12.5, None, 75.0]),
        "mean attention drawn": ([0, 1, 2, 3], [9.375, 25.0, None, 68.75]),
        "mean up to the ME layer": ([-0.4, 1.4], [6.25, 6.25]),
        "after it": ([1.6, 3.4], [75.0, 75.0]),
    }


def test_maps_of_several_say_which():
    alpha = ((0.5,), None)
    assert attention_map(alpha)["hovertemplate"] == "block %{y}, head %{x}: %{z:.1f} %<extra></extra>"
    assert attention_map(alpha, of="weight 1")["hovertemplate"].startswith("weight 1, block %{y}")
    assert attention_map((None, None))["z"] == [[], []]


@pytest.mark.parametrize(("heads", "step"), [(1, 1), (16, 1), (17, 2), (64, 4)])
def test_heads_are_named_where_there_is_room(heads, step):
    assert head_axis((None, (0.5,) * heads))["dtick"] == step
    assert head_axis((None,))["dtick"] == 1
