"""What is kept of a batch is what a straightforward computation on the stored activations gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import toys
from melayer.census import observe, reduction
from melayer.errors import ArchitectureError, InputError
from melayer.measurements.criterion import Criterion
from melayer.model import wiring
from observed import batch, check, stored


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_figures_are_those_of_the_stored_activations(family):
    model = toys.plant(toys.make(family), [(3, 7, 3000.0)])
    decoder = wiring.read(model)
    given = batch(20, 13, 13, 1)
    found, activations = stored(decoder, given, observe.places_of(decoder, observe.SITES))
    check(found, activations, given)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=5), st.integers(1, 200))
def test_any_lengths_and_any_pieces(lengths, cached):
    decoder = wiring.read(toys.make("llama"))
    given = batch(*lengths)
    before = reduction._CACHED
    reduction._CACHED = cached * toys.D_MODEL
    try:
        found, activations = stored(decoder, given, observe.places_of(decoder, ["block_out", "ffn_act", "k"]))
    finally:
        reduction._CACHED = before
    check(found, activations, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype):
    decoder = wiring.read(toys.make("llama", dtype=dtype))
    given = batch(19, 8)
    found, activations = stored(decoder, given, observe.places_of(decoder, observe.SITES))
    assert activations[found.places[1]].dtype == dtype
    check(found, activations, given)


def test_sites_are_what_the_model_computes():
    model = toys.make("qwen3")
    decoder = wiring.read(model)
    given = batch(12)
    _, activations = stored(decoder, given, observe.places_of(decoder, observe.SITES))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(given.ids, output_hidden_states=True, past_key_values=cache, use_cache=True)
    place = observe.Place
    assert torch.equal(activations[place("embedding", None)], out.hidden_states[0])
    assert torch.equal(activations[place("block_out", 2)], out.hidden_states[3])
    assert torch.equal(activations[place("final_norm", None)], out.hidden_states[-1])
    for layer in range(toys.N_LAYERS):
        key, value = cache.layers[layer].keys, cache.layers[layer].values
        assert torch.equal(activations[place("k", layer)], key.transpose(1, 2).flatten(2))
        assert torch.equal(activations[place("v", layer)], value.transpose(1, 2).flatten(2))
    block = toys.blocks(model)[4]
    written = block.mlp.down_proj(activations[place("ffn_act", 4)])
    assert torch.equal(activations[place("ffn_out", 4)], written)
    assert torch.equal(activations[place("attn_out", 4)], block.self_attn.o_proj(activations[place("attn_act", 4)]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_watching_leaves_the_model_as_it_was(implementation):
    model = toys.make("llama")
    model.set_attn_implementation(implementation)
    decoder = wiring.read(model)
    given = batch(16, 5)
    with torch.no_grad():
        before = model(given.ids, attention_mask=given.attention_mask).logits
    found = observe.observe(decoder, given, observe.places_of(decoder, observe.SITES), Criterion())
    alone = observe.observe(decoder, given, observe.places_of(decoder, ["block_out"]), Criterion())
    with torch.no_grad():
        after = model(given.ids, attention_mask=given.attention_mask).logits
    assert torch.equal(before, after)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    outs = [at for at, place in enumerate(found.places) if place.site == "block_out"]
    np.testing.assert_allclose(found.maxima[outs], alone.maxima, rtol=0 if implementation == "sdpa" else 1e-4)


def test_a_massive_token_is_found_where_it_is():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    decoder = wiring.read(model)
    given = batch(20, 9)
    given.ids[0, 4] = toys.X
    found = observe.observe(decoder, given, observe.places_of(decoder, ["block_out"]), Criterion())
    expected = np.zeros((8, 2, 20), bool)
    expected[3:, 0, 4] = True
    assert (found.massive == expected).all()


def test_nothing_is_massive_without_a_plant():
    decoder = wiring.read(toys.make("llama"))
    found = observe.observe(decoder, batch(20), observe.places_of(decoder, ["block_out"]), Criterion())
    assert not found.massive.any()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 60), st.integers(0, 20))
def test_tokens_at_the_threshold_are_judged_by_the_median_itself(ratio, seed):
    """The bins hold the median to 1 %; what they cannot tell is asked again, so the answer is exact."""
    decoder = wiring.read(toys.make("llama"))
    given = batch(11, 7, seed=seed)
    criterion = Criterion(min_abs=0.0, min_ratio=ratio)
    found, activations = stored(decoder, given, observe.places_of(decoder, ["block_out"]), criterion)
    for at, place in enumerate(found.places):
        for row, length in enumerate(given.lengths):
            size = activations[place][row, :length].abs()
            massive = size.amax(-1) > ratio * size.flatten().median()
            assert (found.massive[at, row, :length] == massive.numpy()).all()
            assert not found.massive[at, row, length:].any()


def test_doubt_is_resolved_and_not_ignored(monkeypatch):
    asked = []
    original = reduction._median
    monkeypatch.setattr(reduction, "_median", lambda x: asked.append(len(x)) or original(x))
    decoder = wiring.read(toys.make("llama"))
    _, activations = stored(decoder, batch(11), observe.places_of(decoder, ["block_out"]), Criterion())
    size = activations[observe.Place("block_out", 5)][0].abs()
    exact = float(size.amax(-1)[3] / size.flatten().median())
    assert not asked  # nothing is near the usual threshold
    stored(decoder, batch(11), observe.places_of(decoder, ["block_out"]), Criterion(min_abs=0, min_ratio=exact))
    assert asked
    assert set(asked) == {11}


def test_what_is_not_finite_is_counted_and_left_out_of_the_sums():
    model = toys.make("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.inf
    decoder = wiring.read(model)
    given = batch(9)
    given.ids[0, 6] = 5
    found, activations = stored(decoder, given, observe.places_of(decoder, ["embedding", "block_out"]))
    check_embedding = found.places.index(observe.Place("embedding", None))
    assert np.isinf(found.maxima[check_embedding, 0])
    assert found.tokens[check_embedding, 0] == 6
    assert found.n_summed[check_embedding] == 8 * toys.D_MODEL
    assert found.counts[check_embedding, -1] == toys.D_MODEL
    assert np.isfinite(found.sums).all()
    assert not found.massive.any()


def test_a_model_has_the_sites_that_it_has():
    decoder = wiring.read(toys.make("qwen3_5"))
    places = observe.places_of(decoder, observe.SITES)
    linear = [block.layer for block in decoder.blocks if block.attention is None]
    assert linear
    assert not any(place.layer in linear and place.site in ("q", "attn_in", "attn_act") for place in places)
    decoder = wiring.read(toys.make("mixtral"))
    with pytest.raises(InputError, match=r"This model \(mixtral\) has none of the sites ffn_act"):
        observe.places_of(decoder, ["ffn_act"])


def test_a_place_that_did_not_run_is_not_made_up(monkeypatch):
    model = toys.make("llama")
    decoder = wiring.read(model)
    block = toys.blocks(model)[2]
    monkeypatch.setattr(block, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(ArchitectureError, match=r"attn_in of block 2 was not computed in this forward pass"):
        observe.observe(decoder, batch(5), observe.places_of(decoder, observe.SITES), Criterion())
