"""Hundreds of massive scalars at a block: whatever is computed is computed of all of them, however few are listed."""

import json

import numpy as np
import pytest
import torch

import many_massive
import melayer
import toys
from many_massive import LAYER

TEXTS = many_massive.texts()


@pytest.fixture(scope="module")
def model():
    return many_massive.model()


@pytest.fixture(scope="module")
def truths(model):
    return [many_massive.truth(model, text) for text in TEXTS]


@pytest.fixture(scope="module")
def located(model):
    return melayer.locate(model, toys.tokenizer(), texts=TEXTS)


def listed(model, n):
    return melayer.locate(model, toys.tokenizer(), texts=TEXTS, max_listed=n)


def rank(states) -> float:
    values = np.linalg.svd(states, compute_uv=False) ** 2
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))).sum()))


def test_the_toy_is_what_it_should_be(truths):
    assert all(150 < truth.massive[LAYER].sum() < 600 for truth in truths)
    assert not any(truth.massive[:LAYER].any() for truth in truths)
    assert all(9 <= len(truth.tokens_at(LAYER)) <= 11 for truth in truths)


def test_everything_is_counted(located, truths):
    assert located.me_layer == LAYER
    for row in located.blocks:
        assert row.n_massive == sum(int(truth.massive[row.layer].sum()) for truth in truths)
    for row, truth in zip(located.sequences, truths, strict=True):
        assert set(row.massive_tokens) == truth.tokens_from(LAYER)
    assert located.n_massive == sum(int(truth.massive.sum()) for truth in truths)


def test_every_dimension_has_its_count_and_its_mean(located, truths):
    found = {(row.layer, row.dim): (row.n, row.mean) for row in located.massive_dims}
    expected = {}
    for layer in range(toys.N_LAYERS):
        for dim in range(toys.D_MODEL):
            values = np.concatenate([truth.states[layer, truth.massive[layer, :, dim], dim] for truth in truths])
            if len(values):
                expected[layer, dim] = (len(values), pytest.approx(values.mean(), rel=1e-5))
    assert found == expected
    assert sum(n for (layer, _), (n, _) in found.items() if layer == LAYER) == located.blocks[LAYER].n_massive


def test_what_is_listed_is_the_beginning_of_all_and_says_so(located, truths):
    values = located.to_dict()
    assert values["n_massive"] == located.n_massive > values["n_massive_listed"] == len(values["massive"])
    assert values["settings"]["max_listed"] == 16
    for layer in range(toys.N_LAYERS):
        for place, truth in enumerate(truths):
            of = [abs(s.value) for s in located.massive if (s.layer, s.sequence) == (layer, place)]
            size = np.sort(np.abs(truth.states[layer][truth.massive[layer]]))[::-1]
            assert len(of) == min(16, len(size))
            np.testing.assert_allclose(of, size[:16], rtol=1e-5)
    json.dumps(values, allow_nan=False)


def test_how_much_is_listed_changes_nothing_else(model):
    few, many = (listed(model, n).to_dict() for n in (1, 10**12))  # as many as there are, and no more memory
    assert many["n_massive"] == many["n_massive_listed"] == few["n_massive"]
    for values in (few, many):
        for key in ("massive", "n_massive_listed", "settings"):
            del values[key]
    assert few == many


@pytest.mark.parametrize("max_listed", [1, 16, 1000])
def test_the_rank_without_massive_tokens_is_without_all_of_them(model, truths, max_listed):
    located = listed(model, max_listed)
    result = melayer.rigidity(model, toys.tokenizer(), texts=TEXTS, located=located, n_first_tokens=4)
    for row in result.effective_rank:
        if row.site == "block_out":
            without = [
                rank(np.delete(truth.states[row.layer], sorted(truth.tokens_from(LAYER)), axis=0)) for truth in truths
            ]
            assert row.without_massive == pytest.approx(np.mean(without), rel=1e-4)
            assert row.with_massive == pytest.approx(np.mean([rank(t.states[row.layer]) for t in truths]), rel=1e-4)


def test_sinks_are_those_of_every_massive_token(model):
    T = 30
    result = melayer.sinks(model, toys.tokenizer(), texts=TEXTS, T=T, epsilon=0.03)
    windows = [toys.tokenizer()(text)["input_ids"][:T] for text in TEXTS]
    words = [" ".join(toys.tokenizer().convert_ids_to_tokens(ids)) for ids in windows]
    tokens = [many_massive.truth(model, text).tokens_at(LAYER) for text in words]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(torch.tensor(windows), output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(implementation)
    alphas = np.array([
        [matrix[place, :, key:, key].mean(dim=-1).tolist() for place, keys in enumerate(tokens) for key in keys]
        for matrix in attentions
    ])  # fmt: skip  # [n_layers, n_keys, n_heads]
    assert np.abs(alphas - 0.03).min() > 1e-6  # none stands where rounding decides whether it is a sink
    assert max(map(len, tokens)) > 8
    assert result.massive.n_tokens == sum(map(len, tokens)) == alphas.shape[1]
    assert result.massive.n_not_first == sum(key > 0 for keys in tokens for key in keys)
    np.testing.assert_allclose(result.massive.alpha, alphas.mean(axis=1), atol=1e-5)
    assert result.massive.rate == pytest.approx((alphas > 0.03).mean(), abs=1e-9)
    assert result.massive.rate_after_me == pytest.approx((alphas[LAYER + 1 :] > 0.03).mean(), abs=1e-9)


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("max_listed", [1, 16])
def test_setting_massive_scalars_sets_every_one(model, truths, to, max_listed):
    comparator = melayer.SetMassive.from_located(listed(model, max_listed), to=to)
    for truth in truths:
        with comparator.apply(model), torch.no_grad(), toys.capture(toys.blocks(model)[LAYER]) as seen:
            model(torch.tensor([truth.ids]), use_cache=False)
        out, values = seen["out"][0].double().numpy(), dict(comparator.values)
        for token, dim in zip(*np.nonzero(truth.massive[LAYER]), strict=True):
            assert out[token, dim] == pytest.approx(values[dim], rel=1e-6)
        # Nothing at or below the lowest threshold of these texts is touched.
        small = np.abs(truth.states[LAYER]) <= comparator.massive_above
        np.testing.assert_array_equal(out[small], truth.states[LAYER][small])


def test_sweep_and_contrast_give_the_same_rank(model, truths):
    expected = []
    for layer in range(LAYER + 1, toys.N_LAYERS):
        expected += [np.mean([rank(np.delete(t.states[layer], sorted(t.tokens_from(LAYER)), axis=0)) for t in truths])]
    swept = melayer.sweep(model, toys.tokenizer(), texts=TEXTS, rates=[0], selectors=["random"], T=30)
    assert swept.plain.rank_block_out_without == pytest.approx(np.mean(expected), rel=1e-4)
    measured = melayer.measure(model, toys.tokenizer(), texts=TEXTS, T=30, n_first_tokens=4)
    assert measured.rigidity.mean_rank("block_out")[1] == pytest.approx(np.mean(expected), rel=1e-4)
