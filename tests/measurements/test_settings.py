"""What results say of how they came to be has exactly the keys that its type names."""

from dataclasses import asdict
from typing import get_type_hints

import pytest

import melayer
import toys
from melayer.data.rows import encode, windows
from melayer.data.texts import builtin_texts
from melayer.measurements import settings
from melayer.measurements.criterion import Criterion

TEXTS = [toys.text(20, x_at=4, seed=1), "w1 w2"]
OPTIONS = {"sinks": {"T": 16}, "perplexity": {"T": 16}, "rigidity": {"n_first_tokens": 2}}
VERBS = {
    "locate": settings.LocateSettings,
    "explain": settings.ExplainSettings,
    "rigidity": settings.RigiditySettings,
    "sinks": settings.SinksSettings,
    "perplexity": settings.WindowSettings,
}


@pytest.mark.parametrize("verb", VERBS)
def test_each_measurement_fills_every_key_and_no_other(verb, tokenizer):
    result = getattr(melayer, verb)(toys.make("llama"), tokenizer, texts=TEXTS, **OPTIONS.get(verb, {}))
    assert result.settings.keys() == get_type_hints(VERBS[verb]).keys()
    assert result.settings["texts"] == "given"
    assert result.settings["bos"] == {"asked": None, "sequences_with_bos": 0}
    if verb != "perplexity":
        assert result.settings["layers_counted_from"] == 0


@pytest.mark.parametrize("verb", VERBS)
def test_texts_that_are_not_given_are_built_in(verb, tokenizer):
    found = getattr(melayer, verb)(toys.make("llama"), tokenizer, bos=True, **OPTIONS.get(verb, {})).settings
    assert found["texts"] == "built-in"
    assert found["bos"]["asked"] is True
    assert found["bos"]["sequences_with_bos"] > 1


def test_of_texts_with_a_sequence_each(tokenizer):
    rows = encode(tokenizer, [TEXTS[0], "<s> w1 w2"], max_tokens=11)
    assert settings.text_settings(rows, TEXTS, 11, None) == {
        "texts": "given",
        "n_sequences": 2,
        "n_tokens": 14,
        "max_tokens": 11,
        "bos": {"asked": None, "sequences_with_bos": 1},
    }


def test_of_texts_cut_into_windows(tokenizer):
    rows = windows(tokenizer, TEXTS, 8, bos=True)
    assert settings.window_settings(rows, None, True) == {
        "texts": "built-in",
        "bos": {"asked": True, "sequences_with_bos": 2},
    }


def test_the_criterion_is_all_of_its_fields():
    criterion = Criterion(min_abs=5, persistence=0.5)
    assert settings.criterion_settings(criterion) == asdict(criterion)
    assert list(settings.criterion_settings(criterion)) == list(get_type_hints(settings.CriterionSettings))


def test_the_first_of_the_built_in_texts_are_built_in_also_where_they_are_handed_over():
    """`--limit` hands them over, and so does `sweep`, which runs them several times."""
    own = builtin_texts()
    assert [settings.origin_of(texts) for texts in (None, own, own[:2], tuple(own[:1]))] == ["built-in"] * 4
    assert [settings.origin_of(texts) for texts in (["w1"], own[1:], [*own, "w1"], [own[0] + " w1"])] == ["given"] * 4
