import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

import melayer
import toys
from melayer.errors import InputError
from melayer.model import losses as chunked

TEXTS = [toys.text(150, x_at=0, seed=1), toys.text(70, x_at=0, seed=2)]


def measured(model, texts=TEXTS, **options):
    return melayer.perplexity(model, toys.tokenizer(), texts=texts, **options)


def rows(T, bos=False):
    tokens = [toys.tokenizer()(text)["input_ids"] for text in TEXTS]
    step = T - bos
    return [[1] * bos + ids[start : start + step] for ids in tokens for start in range(0, len(ids) - step + 1, step)]


def losses(model, windows):
    """What transformers computes with labels, of each window alone."""
    with torch.no_grad():
        return [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in windows]


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven positions of logits at a time."""
    monkeypatch.setattr(chunked, "_LOGITS", 7 * toys.VOCAB)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_it_is_that_of_the_loss_of_each_window(family, small_chunks):
    model = toys.make(family)  # softcapping (Gemma 2) and scaled logits (Granite) among them
    result = measured(model, T=32)
    expected = losses(model, rows(32))
    assert result.n_sequences == len(expected) == 4 + 2
    assert result.n_predicted == 6 * 31
    assert result.nll == pytest.approx(np.mean(expected), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_every_window_starts_with_bos_where_it_is_asked_for():
    model = toys.make("llama")
    result = measured(model, T=32, bos=True)
    assert result.settings["bos"] == {"asked": True, "sequences_with_bos": 6}
    assert result.nll == pytest.approx(np.mean(losses(model, rows(32, bos=True))), abs=1e-5)


def test_batches_and_chunks_change_nothing(small_chunks):
    model = toys.make("gemma2")
    chunked = measured(model, T=32)
    one = measured(model, T=32, max_batch_tokens=1)
    assert chunked.nll == pytest.approx(one.nll, abs=1e-6)


def test_no_more_logits_than_a_chunk_are_made(small_chunks):
    model = toys.make("llama")
    made = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[:-1].numel()))
    measured(model, T=32, max_batch_tokens=64)
    handle.remove()
    assert max(made) == 7
    assert sum(made) == 6 * 31 + 3 * 2  # one position of each row when the blocks run, three batches of two rows


def test_half_precision_is_summed_in_float32():
    model = toys.make("llama", dtype=torch.bfloat16)
    assert measured(model, T=32).nll == pytest.approx(np.mean(losses(model, rows(32))), abs=2e-3)


def test_the_model_is_as_it_was():
    model = toys.make("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, T=32)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_and_plain_values():
    seen = []
    result = measured(toys.make("llama"), T=32, max_batch_tokens=64, progress=lambda *at: seen.append(at))
    assert seen == [(64, 192), (128, 192), (192, 192)]
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["sentence"] == (
        f"Over 6 sequences of T = 32 tokens the perplexity is {result.perplexity:.2f} ({result.nll:.4f} nats a token, "
        f"186 tokens predicted; 95 % interval {result.low:.2f} to {result.high:.2f} by sequence, which is rough with "
        "so few)."
    )


def test_the_interval_is_by_sequence():
    model = toys.make("llama")
    result = measured(model, T=32)
    by_window = losses(model, rows(32))
    assert [value / 31 for value in result.by_sequence] == pytest.approx(by_window, abs=1e-5)
    ends = ttest_1samp(by_window, 0).confidence_interval()
    assert (math.log(result.low), math.log(result.high)) == pytest.approx((ends.low, ends.high), abs=1e-5)
    alone = measured(model, texts=[toys.text(40, x_at=0)], T=32)
    assert (alone.n_sequences, alone.low, alone.high) == (1, None, None)
    assert alone.sentence.endswith("tokens predicted; no interval from one sequence).")
    many = measured(model, T=5)
    assert many.n_sequences >= 20
    assert "rough" not in many.sentence


def test_logits_that_are_not_finite_are_said():
    model = toys.make("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="cannot be predicted: the mean negative log-likelihood is nan"):
        measured(model, T=32)


def test_too_short_a_text_is_said():
    with pytest.raises(InputError, match="No text has T = 200 tokens; the longest has 150"):
        measured(toys.make("llama"), T=200)
