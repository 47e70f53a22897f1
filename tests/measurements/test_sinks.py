import json

import numpy as np
import pytest
import torch

import melayer
import toys
from melayer.errors import ArchitectureError, InputError
from sharp_attention import sharp

TEXTS = [toys.text(150, x_at=0, seed=1), toys.text(70, x_at=0, seed=2)]


def measured(model, texts=TEXTS, **options):
    return melayer.sinks(model, toys.tokenizer(), texts=texts, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_rates_are_those_of_eager_attention(family):
    model = sharp(family)
    result = measured(model, T=32, epsilon=0.06)
    assert result.n_sequences == 4 + 2
    tokens = [toys.tokenizer()(text)["input_ids"] for text in TEXTS]
    rows = [ids[start : start + 32] for ids in tokens for start in range(0, len(ids) - 31, 32)]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor(rows), output_attentions=True, use_cache=False).attentions
    alphas = np.stack([matrix[:, :, :, 0].mean(dim=-1).numpy() for matrix in attentions if matrix is not None])
    assert np.abs(alphas - 0.06).min() > 5e-5  # none stands where rounding decides whether it is a sink
    layers = [layer for layer, alpha in enumerate(result.alpha) if alpha is not None]
    np.testing.assert_allclose([result.alpha[layer] for layer in layers], alphas.mean(axis=1), atol=1e-4)
    assert result.rate == pytest.approx((alphas > 0.06).mean(), abs=1e-6)
    for layer, alpha in zip(layers, alphas, strict=True):
        assert result.rate_by_layer[layer] == pytest.approx((alpha > 0.06).mean(), abs=1e-6)
    heads = {(layers[n], head) for n, head in zip(*np.nonzero((alphas > 0.06).mean(axis=1) > 0.5), strict=True)}
    assert {(head.layer, head.head) for head in result.heads} == heads


def test_before_and_after_the_me_layer_and_massive_tokens():
    model = toys.plant(sharp("llama"), [(3, 7, 3000.0)])
    texts = [toys.text(40, x_at=0, seed=1), toys.text(40, x_at=11, seed=2)]
    result = measured(model, texts, T=40, epsilon=0.02)
    assert result.me_layer == 3
    assert (result.massive.n_tokens, result.massive.n_not_first) == (2, 1)
    by_layer = result.rate_by_layer
    assert result.rate_until_me == pytest.approx(np.mean(by_layer[:4]))
    assert result.rate_after_me == pytest.approx(np.mean(by_layer[4:]))
    model.set_attn_implementation("eager")
    drawn = []
    with torch.no_grad():
        for text, key in zip(texts, (0, 11), strict=True):
            ids = toys.tokenizer()(text, return_tensors="pt")["input_ids"]
            attentions = model(ids, output_attentions=True, use_cache=False).attentions
            drawn.append([matrix[0, :, key:, key].mean(dim=-1).tolist() for matrix in attentions])
    np.testing.assert_allclose(result.massive.alpha, np.mean(drawn, axis=0), atol=1e-4)


def test_without_an_me_layer_there_is_no_before_and_after():
    result = measured(sharp("llama"), T=32)
    assert result.me_layer is None
    assert result.rate_after_me is None
    assert result.massive is None
    assert result.sentence.endswith("there is no ME layer to compare before and after.")


def test_every_window_starts_with_bos_where_it_is_asked_for():
    result = measured(sharp("llama"), T=32, bos=True)
    assert result.settings["bos"]["sequences_with_bos"] == result.n_sequences == 4 + 2


def test_the_batch_size_changes_nothing():
    model = sharp("gemma3")
    whole, one = measured(model, T=32), measured(model, T=32, max_batch_tokens=1)
    np.testing.assert_allclose(whole.alpha, one.alpha, atol=1e-5)


def test_the_model_is_as_it_was():
    model = sharp("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    measured(model, T=32)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_to_dict_is_plain_and_stable():
    values = json.loads(json.dumps(measured(sharp("qwen3_next"), T=32).to_dict(), allow_nan=False))
    assert set(values) >= {
        "melayer_version",
        "model",
        "settings",
        "T",
        "epsilon",
        "key",
        "alpha",
        "rate",
        "rate_after_me",
    }
    assert values["alpha"][0] is None  # linear attention
    assert len(values["alpha"][3]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": 200}, "No text has T = 200 tokens; the longest has 150. Give longer texts, or a T of at most 150"),
        ({"T": 601}, "T = 601 tokens were asked for, but the model has 600 positions. Give a T of at most 600"),
        ({"T": 1}, "The length T is 1; expected at least 2"),
        ({"epsilon": 2.0}, "epsilon is 2.0; expected a share of attention between 0 and 1"),
        ({"texts": ["w1"]}, "No text has T = 64 tokens; the longest has 1"),
    ],
)
def test_bad_input_is_said(options, message):
    with pytest.raises(InputError, match=message):
        measured(sharp("llama"), **options)


def test_activations_that_are_not_finite_are_said():
    model = sharp("llama")
    with torch.no_grad():
        toys.blocks(model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite from the output of block 2 on .* Load the model in a wider dtype"):
        measured(model, T=32)


def test_a_model_without_softmax_attention():
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(ArchitectureError, match="has softmax attention, so there are no attention sinks"):
        measured(AutoModelForCausalLM.from_config(config).eval(), T=32)


@pytest.mark.demo
def test_the_demo_model(demo):
    # Measured before with BOS put first and T = 256 on other texts: 0.85 after the ME layer. The shape holds here.
    result = melayer.sinks(demo.model, demo.tokenizer)
    assert result.me_layer == 11
    assert result.T == 64
    assert result.rate_after_me > 0.8
    assert result.rate_after_me > result.rate_until_me + 0.3
