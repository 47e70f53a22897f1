"""A batch and the probe: where they go, and what they leave as it was."""

import pytest
import torch

import toys
from melayer.data.rows import Batch, Row
from melayer.errors import InputError
from melayer.model.forward import embedding_weight, forward, input_device, probe_ids


def batch():
    rows = (Row(0, "", (5, 9, toys.X), (), 0, False), Row(1, "", (7, 8), (), 0, False))
    return Batch(rows, torch.tensor([[5, 9, toys.X], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next"])
def test_a_batch_runs_as_the_model_would_run_it(family):
    model, given = toys.make(family).train(), batch()
    with toys.capture(toys.blocks(model)[-1]) as seen:
        forward(model, given)
        watched = seen["out"]
        assert model.training
        assert not watched.requires_grad
        model.eval()
        with torch.no_grad():
            model(given.ids, attention_mask=given.attention_mask, use_cache=False)
    assert torch.equal(watched, seen["out"])


@pytest.mark.parametrize("token", [toys.VOCAB, -1])
def test_a_token_that_the_model_does_not_have_is_named(token):
    model, given = toys.make("llama"), batch()
    given.ids[0, 1] = token
    with pytest.raises(
        InputError, match=rf"Token id {token} was given to LlamaForCausalLM, whose embedding has 64 rows"
    ):
        forward(model, given)


def test_the_logits_of_one_place_are_made():
    model = toys.make("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    forward(model, batch())
    handle.remove()
    assert seen == [(2, 1, toys.VOCAB)]


def test_ids_go_where_the_embedding_is_and_to_the_host_where_it_is_offloaded():
    model = toys.make("llama")
    assert embedding_weight(model) is model.model.embed_tokens.weight
    assert input_device(model) == torch.device("cpu")
    model.model.embed_tokens.to("meta")
    assert embedding_weight(model).device.type == "meta"
    assert input_device(model) == torch.device("cpu")


def test_the_probe_differs_in_the_last_token_and_has_no_id_that_the_model_lacks():
    ids = probe_ids(toys.make("llama"))
    assert ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 5]]
    small = toys.make("llama", vocab_size=3)
    ids = probe_ids(small)
    assert ids.max() < 3
    assert torch.equal(ids[0, :3], ids[1, :3])
    assert ids[0, 3] != ids[1, 3]
    with torch.no_grad():
        assert torch.isfinite(small(ids).logits).all()
