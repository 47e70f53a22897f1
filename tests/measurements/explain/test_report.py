"""The section on why the massive activation is there."""

import dataclasses

import pytest

import hand_made
from melayer.measurements.explain.report import section
from melayer.presentation.figures import ORANGE
from rendering import checked


def with_layer(**changes):
    result = hand_made.explained()
    return dataclasses.replace(result, layers=(dataclasses.replace(result.layers[0], **changes),))


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.explained()))


def test_every_part_is_there(parts):
    made = section(hand_made.explained())
    assert (made.key, made.title, made.answer) == ("explain", "Why it is there", hand_made.explained().sentence)
    assert list(parts) == [
        "explain-budget-1",
        "explain-neurons-1",
        "explain-counterfactuals-1",
        "Block 1: the causes in each text",
        "Block 1: what drives neuron 17",
        "Block 1: the write against the down projection's singular vectors",
        "Block 1: the experts that the token visits",
        "Block 1: log10 of the norms' ratios, both branches",
    ]


@pytest.mark.parametrize(
    ("key", "takeaway"),
    [
        (
            "explain-budget-1",
            "From the residual stream to the FFN's write the massive token's norm gains +2.62 powers of ten more than "
            "the others; the step “gate and up” gives +1.88 of them.",
        ),
        (
            "explain-neurons-1",
            "Neuron 17 of expert 2 writes 75.0% of what the FFN returns there, the top two 95.0%; all that are not "
            "shown write 5.0%.",
        ),
        (
            "explain-counterfactuals-1",
            "The block makes -2.0 into -4,000.0. Of what the block adds least is left in no_top_2 (-0.1%, value 1.0); "
            "with a flat gamma before the FFN 97.5% is left.",
        ),
        ("Block 1: the causes in each text", "The texts differ: ffn, joint."),
    ],
)
def test_takeaways_are_computed(parts, key, takeaway):
    assert parts[key].takeaway == takeaway


def test_the_budget(parts):
    (bars,) = parts["explain-budget-1"].figure["data"]
    assert bars["y"] == [0.75, 1.875, 2.625]
    assert bars["y"][-1] == sum(bars["y"][:-1])
    assert bars["measure"] == ["relative", "relative", "total"]
    assert bars["customdata"][0] == "massive +0.250<br>others -0.500"


def test_a_budget_without_others_to_compare_with():
    budget = tuple(
        dataclasses.replace(step, others=None, excess=None) for step in hand_made.explained().layers[0].budget
    )
    plot = checked(section(with_layer(budget=budget)))["explain-budget-1"]
    assert "gains +2.25 powers of ten (the others have no norms to compare it with)" in plot.takeaway
    assert plot.figure["data"][0]["y"] == [0.25, 2.0, 2.25]
    assert plot.figure["layout"]["yaxis"]["title"]["text"] == "gain (powers of ten)"


def test_the_neurons(parts):
    (bars,) = parts["explain-neurons-1"].figure["data"]
    assert (bars["x"], bars["y"], bars["customdata"]) == (["2/17", "shared/3"], [75.0, 20.0], [-3028.5, -807.6])


def test_a_dense_ffn_has_no_experts_to_name():
    (layer,) = hand_made.explained().layers
    neurons = tuple(dataclasses.replace(neuron, expert=None) for neuron in layer.neurons[:1])
    parts = checked(section(with_layer(neurons=neurons, experts=())))
    plot = parts["explain-neurons-1"]
    assert plot.takeaway.startswith("Neuron 17 writes 75.0% of what the FFN returns there; all that are not")
    assert plot.figure["data"][0]["x"] == ["17"]
    assert "expert" not in plot.reading
    assert not any("experts" in key for key in parts)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_whiskers_reach_what_the_seeds_left(sign):
    """Of a negative value the lowest is what leaves most of it."""
    value, low, high = 4000.0, 1500.0, 3000.0
    ends = sorted([sign * low, sign * high])
    (layer,) = hand_made.explained().layers
    rows = (dataclasses.replace(layer.counterfactuals[1], value=sign * 2000.0, lowest=ends[0], highest=ends[1]),)
    plot = checked(section(with_layer(value=sign * value, value_in=0.0, counterfactuals=rows)))[
        "explain-counterfactuals-1"
    ]
    (bars,) = plot.figure["data"]
    assert bars["x"] == [50.0]
    assert bars["x"][0] + bars["error_x"]["array"][0] == pytest.approx(75.0)
    assert bars["x"][0] - bars["error_x"]["arrayminus"][0] == pytest.approx(37.5)


def test_the_counterfactuals(parts):
    (bars,) = parts["explain-counterfactuals-1"].figure["data"]
    assert bars["y"] == ["gamma_flat_1.0", "gamma_permuted", "no_top_2"]
    assert bars["x"] == [97.499, 49.975, -0.075038]  # of what the block adds to -2
    assert bars["customdata"] == [-3900.0, -2000.0, 1.0]
    assert bars["error_x"]["array"] == [0.0, 25.01, 0.0]
    (whole,) = parts["explain-counterfactuals-1"].figure["layout"]["shapes"]
    assert (whole["x0"], whole["line"]["color"]) == (100, ORANGE)


def test_the_tables(parts):
    assert parts["Block 1: the causes in each text"].rows[1] == [
        1, "2: two", 5, "-3,990.0", "joint", "—", "100.0%", "40.0%", "10.0%", "—", "50.0%",
    ]  # fmt: skip
    assert parts["Block 1: what drives neuron 17"].rows == [["gate", 4, "12.500", "90.0%", "1.500"]]
    assert parts["Block 1: the experts that the token visits"].rows == [[2, "0.6250", "95.0%"]]
    steps = parts["Block 1: log10 of the norms' ratios, both branches"].rows
    assert steps[-1] == ["attention", "values", "0.5000", "—", "—"]
    assert len(steps) == 4


def test_texts_that_agree():
    parts = checked(section(with_layer(texts=hand_made.explained().layers[0].texts[:1])))
    assert parts["Block 1: the causes in each text"].takeaway == "The same in all: ffn."


def test_a_block_without_an_ffn_has_what_there_is():
    parts = checked(section(with_layer(budget=(), neurons=(), drivers=(), directions=(), experts=())))
    assert list(parts) == [
        "explain-counterfactuals-1",
        "Block 1: the causes in each text",
        "Block 1: log10 of the norms' ratios, both branches",
    ]


def test_where_it_is_passed_on_what_is_left_is_of_the_value():
    (layer,) = hand_made.explained().layers
    causes = dataclasses.replace(layer.causes, attribution="passed on")
    parts = checked(section(with_layer(value_in=-3990.0, causes=causes)))
    plot = parts["explain-counterfactuals-1"]
    assert plot.figure["data"][0]["x"] == [97.5, 50.0, -0.025]
    assert plot.title == "Block 1: what is left of the value without a part"


def test_where_nothing_can_be_divided_by_there_is_no_picture():
    parts = checked(section(with_layer(value=0.0, value_in=0.0)))
    assert "explain-counterfactuals-1" not in parts
