"""Sink rates over chosen blocks, from figures made by hand and against those of `sinks`."""

from types import SimpleNamespace

import pytest

import melayer
import toys
from masked import ME, model_of
from melayer.studies.sink_rate import sink_rate_after

# Blocks with one head, without attention, with three heads, with one.
DRAWN = SimpleNamespace(rate_by_layer=(1.0, None, 0.5, 0.0), alpha=((0.9,), None, (0.4,) * 3, (0.1,)))


@pytest.mark.parametrize(
    ("layer", "expected"), [(None, 2.5 / 5), (0, 1.5 / 4), (1, 1.5 / 4), (2, 0.0), (3, None), (7, None)]
)
def test_blocks_with_other_numbers_of_heads_are_weighted(layer, expected):
    assert sink_rate_after(DRAWN, layer) == pytest.approx(expected)


def test_only_blocks_without_attention():
    assert sink_rate_after(SimpleNamespace(rate_by_layer=(None, None), alpha=(None, None)), None) is None


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_after_the_me_layer_it_is_that_of_sinks(family):
    texts = [toys.text(24, x_at=0, seed=seed) for seed in range(3)]
    model, tokenizer = model_of(family), toys.tokenizer()
    alpha = [value for heads in melayer.sinks(model, tokenizer, texts=texts, T=16).alpha for value in heads or ()]
    # Some heads draw more than the mean, some less.
    drawn = melayer.sinks(model, tokenizer, texts=texts, T=16, epsilon=sum(alpha) / len(alpha))
    assert drawn.me_layer == ME
    assert 0 < drawn.rate < 1
    assert sink_rate_after(drawn, ME) == pytest.approx(drawn.rate_after_me)
    assert sink_rate_after(drawn, None) == pytest.approx(drawn.rate)
