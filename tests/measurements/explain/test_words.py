"""The sentence on why a block has its value: what it calls alone, most, jointly, and what it explains."""

import dataclasses
import re

import pytest
import torch

import hand_made
import melayer
import toys
from melayer.measurements.explain.figures import Causes, Counterfactual

CONTEXT = toys.text(20, x_at=4, seed=1)


def said(attribution, *, value_in=0.0, value=1000.0, rows=(), attn=0.0, ffn=1.0, **alone) -> str:
    """The sentence of a block whose figures are these."""
    parts = {"ffn_alone": None, "gamma_alone": None, "post_gamma_alone": None, "jointly": None, **alone}
    (layer,) = hand_made.explained().layers
    return dataclasses.replace(
        layer,
        value=value,
        value_in=value_in,
        causes=Causes(attribution, attn, ffn, **parts),
        counterfactuals=tuple(Counterfactual(name, left, left / value) for name, left in rows),
    ).sentence


@pytest.mark.parametrize(
    ("attribution", "alone", "expected"),
    [
        ("ffn", {"ffn_alone": 0.97}, "the FFN alone creates it ("),
        ("ffn", {"ffn_alone": 0.64}, "the FFN alone creates most of it ("),
        ("ffn", {"ffn_alone": 2.107}, "the FFN creates it against the gamma around it, which holds it down ("),
        ("gamma", {"gamma_alone": 0.91}, "RMSNorm's gamma alone creates it ("),
        ("gamma", {"gamma_alone": 0.6}, "RMSNorm's gamma alone creates most of it ("),
        ("post_gamma", {"post_gamma_alone": 0.9}, "the gamma of the norm after the FFN alone creates it ("),
        ("joint", {"jointly": 0.95, "ffn_alone": 0.05}, "norm and FFN create it jointly ("),
        ("joint", {"jointly": 0.7, "ffn_alone": 0.3}, "norm and FFN create most of it jointly ("),
        ("joint", {"jointly": 1.231, "ffn_alone": -0.231}, "norm and FFN create more than all of it jointly ("),
        ("joint", {"jointly": 0.3, "ffn_alone": 0.4}, "no part of the FFN branch alone creates half of it ("),
    ],
)
def test_alone_is_said_where_it_is_alone(attribution, alone, expected):
    assert f"Block 1: {expected}" in said(attribution, **alone)


@pytest.mark.parametrize(
    ("attn", "ffn", "expected"),
    [
        (1.0, 0.0, "attention creates it ("),
        (0.6, 0.4, "attention creates most of it ("),
        (1.5, -0.5, "attention creates more than all of it ("),
    ],
)
def test_attention(attn, ffn, expected):
    text = said("attention", attn=attn, ffn=ffn)
    assert f"Block 1: {expected}" in text
    assert ("; of what the block adds the FFN writes " in text) == (attn != 1.0)
    assert (", against each other" in text) == (ffn < 0)


def test_what_attention_writes_beside_the_ffn_is_not_credited_to_it():
    text = said("ffn", attn=0.4, ffn=0.6, ffn_alone=0.98)
    assert "the FFN alone creates most of it (" in text  # 59 % of what the block adds
    assert "; of what the block adds the FFN writes 60.0% and attention 40.0%; " in text
    assert "the largest part of it (44.8%)" in said("ffn", attn=0.3, ffn=0.7, ffn_alone=0.64)


def test_what_came_in_from_before_is_no_effect():
    text = said("ffn", value_in=489.0, rows=[("no_top_2", 489.0), ("gamma_flat_1.0", 1000.0)], ffn_alone=1.0)
    assert "dimension 5, 489 to 1,000)" in text
    assert (
        "of what the block adds, without RMSNorm's gamma (flat) 100.0%, without the top two neurons 0.0% remains"
        in text
    )
    assert "48.9%" not in text


def test_shares_out_of_range_are_explained():
    text = said("ffn", rows=[("gamma_flat_1.0", 2107.0), ("no_top_2", -300.0)], ffn_alone=1.889, jointly=-0.889)
    assert "without RMSNorm's gamma (flat) 210.7% (so it holds the rest down)" in text
    assert "without the top two neurons -30.0% (the opposite)" in text
    assert "FFN alone 188.9% (flat gammas leave more than there is: they hold it down)" in text
    assert "jointly -88.9% (negative, since the parts alone make more than there is)" in text
    more = said("joint", ffn_alone=-0.231, jointly=1.231)
    assert (
        "FFN alone -23.1% (against it), jointly 123.1% (more than all, since alone they write less than nothing)"
        in more
    )


def test_zero_has_no_sign():
    text = said("ffn", value_in=-0.3, rows=[("no_top_2", -0.4)], ffn_alone=0.9999, gamma_alone=-0.0001, jointly=-0.0002)
    assert "-0.0%" not in text
    assert "dimension 5, 0 to 1,000)" in text


def test_what_is_passed_on_has_no_shares():
    text = said("passed on", value_in=999.0, rows=[("no_top_2", 400.0)])
    assert text.endswith("dimension 5, 999 to 1,000).")


# --- on models -----------------------------------------------------------------------------------------------------


def explained(model, **options):
    return melayer.explain(model, toys.tokenizer(), texts=[CONTEXT], **options)


def test_the_second_of_two_stages_is_judged_by_what_it_adds():
    model = toys.plant(toys.make("llama"), [(2, 7, 2500.0), (4, 7, 2600.0)], context=CONTEXT)
    second = explained(model).layers[1]
    assert (second.layer, second.value_in) == (4, pytest.approx(2500, rel=0.01))
    assert second.relative("no_top_2") == pytest.approx(0.49, abs=0.02)  # all of which came in from before
    assert second.remaining("no_top_2") == pytest.approx(0.0, abs=1e-3)
    assert second.remaining("no_ffn") == pytest.approx(0.0, abs=1e-3)
    assert re.search(r"without the top two neurons -?0\.0% remains", second.sentence)
    values = second.to_dict()
    row = next(row for row in values["counterfactuals"] if row["name"] == "no_top_2")
    assert row["remaining"] == second.remaining("no_top_2")
    assert values["interaction_added"] == pytest.approx(
        second.remaining("gamma_flat_1.0") + second.remaining("no_top_2") - 1 - second.remaining("gamma_flat+no_top_2")
    )


def test_a_gamma_that_holds_the_value_down():
    model = toys.make("llama")
    with torch.no_grad():
        toys.blocks(model)[3].post_attention_layernorm.weight[toys.LISTEN] = 0.6
    model = toys.plant(model, [(3, 7, 3000.0)], context=CONTEXT)
    (layer,) = explained(model).layers
    assert layer.causes.attribution == "ffn"  # what flat gammas leave is the largest share
    assert layer.remaining("gamma_flat_1.0") > 2
    assert "the FFN creates it against the gamma around it, which holds it down" in layer.sentence
    assert "(so it holds the rest down)" in layer.sentence
    assert "(negative, since the parts alone make more than there is)" in layer.sentence


def test_an_me_layer_that_adds_nothing_to_the_peak_is_said_to():
    writes = [(0, 7, 800.0), *((layer, 9, 4000.0) for layer in range(1, 6))]
    model = toys.plant(toys.make("llama"), writes, context=CONTEXT)
    result = explained(model)
    assert [layer.layer for layer in result.layers] == [0, 1, 2, 3, 4, 5]
    (note,) = result.notes
    assert re.match(
        r"Block 0 is the ME layer by definition, but adds 0\.2% of the peak \(block 5, dimension 9, 17,\d{3}\); "
        r"blocks that add 10% or more: 1, 2, 3, 4, 5\.",
        note,
    )
    assert explained(model, layers=[3]).notes == ()
    assert explained(toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT)).notes == ()
