import pytest
import torch
from torch import nn

import toys
from melayer import architecture
from melayer.hooks import Point, first_tensor, measuring, watch

IDS = torch.tensor([[5, 9, toys.X, 12, 7]])


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_watching_changes_no_logit_and_leaves_no_hook(family):
    model = toys.make(family)
    points = [((b.layer, site), point) for b in architecture.read(model).blocks for site, point in b.sites.items()]
    with torch.no_grad():
        plain = model(IDS).logits
        seen = []
        with watch(points, lambda key, tensor: seen.append(key)):
            watched = model(IDS).logits
    assert torch.equal(plain, watched)
    assert sorted(seen) == sorted(key for key, _ in points)
    assert n_hooks(model) == 0


def test_hooks_are_removed_after_an_exception():
    model = toys.make("llama")
    block = toys.blocks(model)[2]

    def fail(key, tensor):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), watch([("in", Point(block, "input"))], fail):
        model(IDS)
    assert n_hooks(model) == 0


def test_measuring_restores_what_trains_also_after_an_exception():
    model = toys.make("llama").train()
    toys.blocks(model)[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), measuring(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_module_without_a_tensor_is_an_error():
    class Silent(nn.Module):
        def forward(self, x):
            return "nothing"

    module = Silent()
    with (
        pytest.raises(TypeError, match="Silent has no tensor at its output"),
        watch([("out", Point(module, "output"))], lambda key, tensor: None),
    ):
        module(torch.ones(1))


def test_first_tensor_looks_into_tuples():
    tensor = torch.ones(2)
    assert first_tensor((None, tensor, torch.zeros(2))) is tensor
    assert first_tensor(tensor) is tensor
    assert first_tensor({"a": tensor}) is None
