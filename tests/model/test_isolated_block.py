"""A block run alone is that block in the model: unchanged bit for bit, changed as the model would be with it."""

import copy

import pytest
import torch

import toys
from melayer.data.rows import Batch, Row
from melayer.errors import ArchitectureError
from melayer.model import hooks, wiring
from melayer.model.forward import forward
from melayer.model.hooks import Point
from melayer.model.isolated_block import BlockAlone, flat, permuted, with_gamma, zeroed

ROW = (5, 9, toys.X, 12, 7, 30, 31)
LAYER = 3  # in hybrids one with softmax attention
LAYERS = {family: (2, LAYER) if family in toys.HYBRID else (LAYER,) for family in toys.FAMILIES}


def alone(model, layer=LAYER):
    """The block with what the model calls it with, and what it returned then [seq, d_model]."""
    decoder = wiring.read(model)
    block, called = decoder.blocks[layer], []
    ids = torch.tensor([ROW])
    with (
        toys.capture(block.module) as seen,
        hooks.record_arguments([(0, block.module)], lambda *call: called.append(call)),
    ):
        forward(decoder.model, Batch((Row(0, "", ROW, (), 0, False),), ids, torch.ones_like(ids)))
    ((_, args, kwargs),) = called
    return BlockAlone(model, block, args, kwargs), seen["out"][0]


def uneven(model):
    """The model with gammas that differ from one dimension to the next."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_an_unchanged_block_gives_what_it_gave_in_the_model(family):
    model = toys.make(family).train()
    for layer in LAYERS[family]:
        block, recorded = alone(model, layer)
        assert torch.equal(block.run()["block_out"], recorded)
        assert torch.equal(block.run()["block_out"], recorded)  # and again: running it changes nothing
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_what_is_seen_inside_adds_up_to_what_it_returns(family):
    block, recorded = alone(toys.make(family))
    sites = {site: point for site, point in block.block.sites.items() if site != "block_out"}
    seen = block.run(points=sites)
    assert set(seen) == {*sites, "block_out"}
    assert torch.equal(seen["block_out"], recorded)
    total = seen["block_in"] + seen["attn_out"] + seen["ffn_out"]
    torch.testing.assert_close(total, recorded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_a_branch_that_writes_nothing_is_missing_from_the_sum(family):
    block, recorded = alone(toys.make(family))
    plain = block.run(points={"mid": block.block.sites.get("mid", block.block.sites["block_in"]),
                              "attn_out": block.block.sites["attn_out"]})  # fmt: skip
    cut = block.run([zeroed(block.block.sites["ffn_out"])], points={"ffn_out": block.block.sites["ffn_out"]})
    assert not cut["ffn_out"].any()
    left = plain["mid"] + (plain["attn_out"] if family in toys.PARALLEL else 0)
    torch.testing.assert_close(cut["block_out"], left, rtol=1e-5, atol=1e-5)
    assert (cut["block_out"] - recorded).abs().max() > 1e-3
    assert torch.equal(block.run()["block_out"], recorded)  # nothing of the change is left


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3_next", "olmo2"])
@pytest.mark.parametrize("change", [flat(1.0), flat(0.5), permuted(0), lambda gamma: torch.zeros_like(gamma)])
def test_another_gamma_is_that_of_weights_that_have_it(family, change):
    model = uneven(toys.make(family))
    block, recorded = alone(model)
    norm = block.block.ffn_norm or block.block.ffn_post_norm
    run = block.run(with_gamma(norm, change, toys.D_MODEL))["block_out"]
    changed = copy.deepcopy(model)
    weight = toys.blocks(changed)[LAYER].get_submodule(norm.name).weight
    offset = 1.0 if family.startswith(("gemma", "qwen3_next")) else 0.0
    with torch.no_grad():
        weight.copy_(change(weight + offset) - offset)
    torch.testing.assert_close(run, alone(changed)[0].run()["block_out"], rtol=1e-4, atol=1e-5)
    assert (run - recorded).abs().max() > 1e-4


def test_the_same_gamma_changes_nothing():
    block, recorded = alone(uneven(toys.make("llama")))
    run = block.run(with_gamma(block.block.ffn_norm, flat(0.0), toys.D_MODEL))["block_out"]
    assert torch.equal(run, recorded)


def test_a_norm_that_computes_something_else_is_refused():
    model = uneven(toys.make("llama"))
    norm = toys.blocks(model)[LAYER].post_attention_layernorm
    plain = norm.forward
    norm.forward = lambda x: plain(x).tanh()
    block, _ = alone(model)
    with pytest.raises(ArchitectureError, match=r"The norm post_attention_layernorm .LlamaRMSNorm. does not compute"):
        block.run(with_gamma(block.block.ffn_norm, flat(1.0), toys.D_MODEL))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_flat_and_permuted_by_hand():
    gamma = torch.tensor([1.0, 2.0, 6.0])
    assert flat(0.5)(gamma).tolist() == [2.0, 2.5, 4.5]
    assert flat(1.0)(gamma).tolist() == [3.0, 3.0, 3.0]
    shuffled = permuted(1)(torch.arange(50.0))
    assert torch.equal(shuffled, permuted(1)(torch.arange(50.0)))
    assert not torch.equal(shuffled, permuted(2)(torch.arange(50.0)))
    assert torch.equal(shuffled.sort().values, torch.arange(50.0))


def test_edits_follow_one_another_and_calls_are_told():
    model = toys.make("llama")
    block, _ = alone(model)
    point, into = block.block.sites["ffn_out"], []
    doubled = block.run([(point, lambda x: x * 2), (point, lambda x: x + 1)], points={"ffn_out": point})
    plain = block.run(
        points={"ffn_out": point, "mid": block.block.sites["mid"]}, listen=[(into, block.block.ffn.module)]
    )
    torch.testing.assert_close(doubled["ffn_out"], plain["ffn_out"] * 2 + 1)
    torch.testing.assert_close(doubled["block_out"], plain["mid"] + plain["ffn_out"] * 2 + 1)
    (((hidden,), kwargs),) = into
    assert hidden.shape == (1, len(ROW), toys.D_MODEL)
    assert kwargs == {}
    assert isinstance(point, Point)
