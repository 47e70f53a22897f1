"""What a result says in words, from figures made by hand."""

import dataclasses
import json

import pytest

from melayer.model.provenance import ModelInfo
from melayer.quantisation.result import (
    Difference,
    Elsewhere,
    InputRow,
    PerplexityScore,
    Prefix,
    QuantCheckResult,
    Setting,
    TreatmentEffect,
    shown,
)

INPUTS = (InputRow(0, ("q", "k"), 8), InputRow(0, ("mlp.down",), 16), InputRow(1, ("attn.q", "attn.k"), 8))


def score(perplexity):
    return PerplexityScore(1.0, perplexity, (4.0, 5.0))


def setting(treatment, perplexity, error=(0.1, 0.5, 0.3), format="int8", granularity="per-tensor", **differences):
    found = {"cost": None, "against_plain": None, "by_mask": None, **differences}
    return Setting(format, granularity, treatment, score(perplexity), **found, error=error, error_apart=(None,) * 3)


def result_of(*rows, **fields):
    values = {
        "model": ModelInfo("toy", "f00d", "float32", "llama", 2, 8),
        "settings": {"treatments": ["plain"], "mask": None, "calibration": "given"},
        "me_layer": 0,
        "T": 8,
        "n_sequences": 2,
        "n_calibration": 2,
        "n_predicted": 12,
        "prefix": Prefix((3,), ("X",), (True,)),
        "elsewhere": {"calibration": Elsewhere(0, 14), "evaluation": Elsewhere(1, 14)},
        "unquantised": score(20.0),
        "unquantised_mask": None,
        "inputs": INPUTS,
        "rows": rows,
        "notes": (),
        "linear_inputs": (),
        "calibrated": {},
        "baked": {},
    }
    return QuantCheckResult(**{**values, **fields})


PLAIN, BAKED = setting("plain", 1234.5), setting("baked", 21.0)


def test_the_sentence_is_of_the_first_format_and_granularity():
    others = (setting("plain", 30.0, granularity="per-token"), setting("plain", None, format="int4"))
    assert result_of(PLAIN, BAKED, *others).sentence == (
        "Unquantised the perplexity is 20.00; with int8 activations, one static scale a tensor, it is 1,234.50 "
        "untreated, 21.00 with the prefix baked; the worst site (plain) is block 0 mlp.down, off by 50.0%."
    )


def test_the_sentence_without_errors_and_without_a_finite_loss():
    lost = setting("mask", None, error=(None,) * 3, format="fp8", granularity="per-channel")
    assert result_of(lost).sentence == (
        "Unquantised the perplexity is 20.00; with fp8 activations, one static scale a channel, it is not finite "
        "under the mask."
    )


@pytest.mark.parametrize(
    ("perplexity", "said"),
    [(None, "not finite"), (1.0, "1.00"), (99999.5, "99,999.50"), (1e5, "1.0e+05"), (3.21e30, "3.2e+30")],
)
def test_perplexities_for_people(perplexity, said):
    assert shown(perplexity) == said


def test_a_setting_is_found_by_its_names():
    result = result_of(PLAIN, BAKED)
    assert result.find("int8", "per-tensor", "baked") is BAKED
    assert result.find("int8", "per-token", "baked") is None


def test_errors_that_are_not_known_count_nowhere():
    row = setting("plain", 1.0, error=(None, 0.5, 0.25))
    assert row.median_error == 0.375
    result = result_of(row)
    assert result.worst(row) == [(INPUTS[1], 0.5), (INPUTS[2], 0.25)]
    assert result.worst(row, 1) == [(INPUTS[1], 0.5)]
    assert setting("plain", 1.0, error=(None,) * 3).median_error is None


def test_what_inputs_and_settings_are_called():
    assert [at.label for at in INPUTS] == ["block 0 q, k", "block 0 mlp.down", "block 1 attn.q, k"]
    assert PLAIN.label == "int8 per-tensor plain"


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (-0.4, -0.5, -0.3, "gives back"),
        (0.2, 0.1, 0.3, "costs"),
        (0.02, -0.01, 0.05, "not shown"),
        (0.02, 0.0, 0.05, "not shown"),
        (0.02, None, None, "not shown"),
    ],
)
def test_an_effect_is_said_as_far_as_its_interval_shows_it(value, low, high, said):
    assert TreatmentEffect("int8", "per-tensor", "it", Difference(value, low, high)).verdict == said


def test_what_treatments_change():
    first, second, third = (Difference(value, value - 1, value + 1) for value in (1.0, 2.0, 3.0))
    rows = (
        PLAIN,
        setting("baked", 2.0, against_plain=first),
        setting("baked+mask", 2.0, against_plain=first, by_mask=second),  # against baked: the mask's own part
        setting("mask", 2.0, against_plain=third, by_mask=third),
        setting("baked+mask", 2.0, against_plain=first, format="fp8"),  # baked was not measured
    )
    assert [(effect.format, effect.what, effect.by) for effect in result_of(*rows).changes] == [
        ("int8", "baking", first),
        ("int8", "mask beside baking", second),
        ("int8", "mask alone", third),
    ]


def test_to_dict_is_plain_and_a_setting_is_read_from_it():
    row = setting("baked", 21.0, cost=Difference(0.1, None, None))
    values = json.loads(json.dumps(result_of(row, unquantised_mask=score(19.0)).to_dict(), allow_nan=False))
    assert list(values) == [
        "melayer_version", "model", "settings", "sentence", "me_layer", "T", "n_sequences", "n_calibration",
        "n_predicted", "prefix", "massive_elsewhere", "unquantised", "unquantised_mask", "inputs", "rows", "notes",
    ]  # fmt: skip
    assert values["massive_elsewhere"]["evaluation"] == {"n": 1, "n_tokens": 14}
    assert values["unquantised_mask"]["perplexity"] == 19.0
    # What it is compared with may be another the next time.
    assert Setting.from_dict(values["rows"][0]) == dataclasses.replace(row, cost=None)


def test_nothing_static_and_nothing_baked_writes_nothing(tmp_path):
    assert result_of(PLAIN).save(tmp_path / "out") == []
    assert not list(tmp_path.iterdir())
