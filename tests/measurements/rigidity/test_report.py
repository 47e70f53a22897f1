"""The section on what the massive activation makes rigid."""

import dataclasses

import pytest

import hand_made
from melayer.measurements.rigidity.report import section
from rendering import checked


def with_changes(**changes):
    return checked(section(dataclasses.replace(hand_made.rigid(), **changes)))


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.rigid()))


def test_both_plots_are_there(parts):
    made = section(hand_made.rigid())
    assert (made.key, made.title, made.answer) == ("rigidity", "What it makes rigid", hand_made.rigid().sentence)
    assert list(parts) == ["rigidity-cosine", "rigidity-rank"]
    assert list(with_changes(effective_rank=())) == ["rigidity-cosine"]


def test_takeaways_are_computed(parts):
    assert parts["rigidity-cosine"].takeaway == (
        "The state turns most between blocks 2 and 3 (cosine 0.125) and least from block 1 to block 2 (mean cosine "
        "0.9999); over first tokens it is 0.750 at the ME layer."
    )
    assert parts["rigidity-rank"].takeaway == (
        "After the ME layer the effective rank is 2.5 for the residual stream with the massive tokens and 5.5 without; "
        "3.1 for what attention reads with the massive tokens and 7.1 without."
    )


def test_what_cannot_be_compared_is_said():
    unknown = with_changes(cosine_next=(None, None, None))
    assert unknown["rigidity-cosine"].takeaway == "No two neighbouring blocks could be compared."
    nowhere = with_changes(me_layer=None)
    assert nowhere["rigidity-rank"].takeaway == "Over blocks and sites the effective rank goes from 1.0 to 6.0."
    assert nowhere["rigidity-cosine"].figure["layout"]["shapes"] == []
    assert "the state of token 0" in nowhere["rigidity-cosine"].reading
    ranks = tuple(
        dataclasses.replace(row, with_massive=None, without_massive=None) for row in hand_made.rigid().effective_rank
    )
    assert with_changes(effective_rank=ranks)["rigidity-rank"].takeaway == "No effective rank could be computed."


def test_the_cosines(parts):
    curves = {trace["name"]: trace for trace in parts["rigidity-cosine"].figure["data"]}
    assert {name: trace["y"] for name, trace in curves.items()} == {
        "to the next block": [0.25, 0.9999, 0.125],
        "to the peak state": [0.25, 0.9999, 1.0, 0.125],
        "over first tokens": [0.5, 0.75, 0.8, None],
        "over the 6 massive ones": [0.6, 0.99, 0.999, None],
    }
    assert curves["over first tokens"]["marker"]["size"] == 5
    assert curves["over the 6 massive ones"]["line"]["dash"] == "dash"
    assert [note["text"] for note in parts["rigidity-cosine"].figure["layout"]["annotations"]] == ["ME layer 1"]


def test_where_all_first_tokens_are_massive_there_is_one_curve_of_them():
    names = [trace["name"] for trace in with_changes(n_massive_first_tokens=8)["rigidity-cosine"].figure["data"]]
    assert names == ["to the next block", "to the peak state", "over first tokens"]


def test_a_fixed_first_token_is_said_to_be_trivial():
    plot = with_changes(fixed_first_token=True)["rigidity-cosine"]
    assert "over texts with the same first token, which is 1 by causality" in plot.reading
    assert "over first tokens" not in plot.takeaway


def test_the_ranks(parts):
    curves = {trace["name"]: trace["y"] for trace in parts["rigidity-rank"].figure["data"]}
    assert curves == {
        "what attention reads": [None, 1.5, 1.25, 5.0],
        "what attention reads, without massive tokens": [None, 5.5, 5.25, 9.0],
        "residual stream": [6.0, 1.25, 1.0, 4.0],
        "residual stream, without massive tokens": [9.0, 4.25, 4.0, 7.0],
    }
