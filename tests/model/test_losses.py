"""The losses of every token against those from all logits at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaModel

import toys
from melayer.data.rows import Row, batches
from melayer.errors import ArchitectureError
from melayer.model import losses as module
from melayer.model import wiring
from melayer.model.hooks import cache_argument
from melayer.model.losses import losses


def batch_of(n_tokens=9):
    ids = torch.randint(3, toys.VOCAB - 1, (3, n_tokens), generator=torch.Generator().manual_seed(4)).tolist()
    (batch,) = batches([Row(index, "", tuple(row), (), 0, False) for index, row in enumerate(ids)])
    return batch


def expected(model, batch):
    with torch.no_grad():
        logits = model(batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_they_are_those_of_all_logits(family, monkeypatch):
    model, batch = toys.make(family), batch_of()
    found = losses(wiring.read(model), batch)
    assert found.shape == (3 * 8,)
    torch.testing.assert_close(found, expected(model, batch), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(module, "_LOGITS", 5 * toys.VOCAB)  # five tokens at a time, so that the last chunk is short
    torch.testing.assert_close(losses(wiring.read(model), batch), found, rtol=1e-5, atol=1e-5)


def test_a_cap_on_logits_is_the_models_own():
    capped, uncapped = (toys.make("gemma2", final_logit_softcapping=cap) for cap in (0.1, None))
    batch = batch_of()
    torch.testing.assert_close(losses(wiring.read(capped), batch), expected(capped, batch), rtol=1e-5, atol=1e-5)
    assert (losses(wiring.read(uncapped), batch) - expected(capped, batch)).abs().max() > 1e-3


def test_rows_go_on_from_a_cache():
    model, batch = toys.make("llama"), batch_of()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(batch.ids[:, :4], use_cache=True, **{cache_argument(model): cache})
    rest = [Row(row.index, "", row.ids[4:], (), 0, False) for row in batch.rows]
    (behind,) = batches(rest)
    found = losses(wiring.read(model), behind, cache=cache).reshape(3, -1)
    torch.testing.assert_close(found, expected(model, batch).reshape(3, -1)[:, 4:], rtol=1e-5, atol=1e-5)


def test_a_model_without_a_head_predicts_nothing():
    headless = LlamaModel(toys.CONFIGS["llama"]()).eval()
    with pytest.raises(ArchitectureError, match=r"This model .llama. has no head, so there are no logits"):
        losses(wiring.read(headless), batch_of())
