from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

import toys
from melayer.model import wiring
from melayer.model.hooks import Point, edit, edits_paused, first_tensor, measuring, record_arguments, stoppable, watch

IDS = torch.tensor([[5, 9, toys.X, 12, 7]])


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_watching_changes_no_logit_and_leaves_no_hook(family):
    model = toys.make(family)
    points = [((b.layer, site), point) for b in wiring.read(model).blocks for site, point in b.sites.items()]
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


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])  # gpt-oss' FFN returns a tuple
def test_an_edit_is_what_the_rest_of_the_model_sees(family, side):
    model = toys.make(family)
    ffn = toys.ffn(toys.blocks(model)[2])
    with torch.no_grad():
        plain = model(IDS).logits
        with edit([("ffn", Point(ffn, side))], lambda key, tensor: tensor * 2):
            edited = model(IDS).logits
        with edit([("ffn", Point(ffn, side))], lambda key, tensor: None):
            assert torch.equal(model(IDS).logits, plain)
        assert (edited - plain).abs().max() > 1e-4
        assert torch.equal(model(IDS).logits, plain)
    assert n_hooks(model) == 0


def test_an_edit_reaches_keyword_arguments_and_edits_follow_one_another():
    class Adds(nn.Module):
        def forward(self, x, *, hidden_states):
            return x, hidden_states

    module = Adds()
    point = Point(module, "output")
    with edit([(1.0, point), (10.0, point)], lambda key, tensor: tensor * 2 + key):
        assert module(torch.ones(1), hidden_states=torch.zeros(1))[0].item() == (1 * 2 + 1) * 2 + 10
    inner = nn.Identity()
    with edit([("in", Point(inner, "input"))], lambda key, tensor: tensor + 1):
        assert inner(input=torch.ones(1)).item() == 2


def test_edits_are_removed_after_an_exception():
    model = toys.make("llama")

    def fail(key, tensor):
        raise RuntimeError("stop here")

    points = [(side, Point(toys.blocks(model)[2], side)) for side in ("input", "output")]
    with pytest.raises(RuntimeError, match="stop here"), edit(points, fail):
        model(IDS)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("side", ["input", "output"])
def test_an_edit_without_a_tensor_is_an_error(side):
    class Silent(nn.Module):
        def forward(self, x):
            return "nothing"

    module = Silent()
    with (
        pytest.raises(TypeError, match=f"Silent has no tensor at its {side}"),
        edit([("here", Point(module, side))], lambda key, tensor: tensor),
    ):
        module("nothing")


def test_a_block_can_be_called_again_with_its_recorded_arguments():
    model = toys.make("qwen3_next")
    block = toys.blocks(model)[3]
    called = []
    with torch.no_grad():
        with toys.capture(block) as seen, record_arguments([("b", block)], lambda *call: called.append(call)):
            model(IDS, use_cache=False)
        ((key, args, kwargs),) = called
        assert key == "b"
        assert torch.equal(first_tensor(block(*args, **kwargs)), seen["out"])
    assert n_hooks(model) == 0


class Twice(nn.Module):
    """A model of one linear map."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return 2 * self.inner(x)


def plus(amount, model, side="output"):
    return edit([(amount, Point(model.inner, side))], lambda key, tensor: tensor + key)


@pytest.mark.parametrize("side", ["input", "output"])
def test_edits_of_one_model_pause_and_those_of_another_do_not(side):
    paused, other, one = Twice(), Twice(), torch.ones(1)
    with plus(1.0, paused, side), plus(1.0, other, side):
        assert paused(one).item() == 4
        with edits_paused(paused):
            assert (paused(one).item(), other(one).item()) == (2, 4)
            with edits_paused(other):
                assert (paused(one).item(), other(one).item()) == (2, 2)
            with edits_paused(paused):
                pass
            assert (paused(one).item(), other(one).item()) == (2, 4)
        with pytest.raises(ZeroDivisionError), edits_paused(paused):
            _ = 1 / 0
        assert paused(one).item() == 4


def test_edits_pause_in_one_thread():
    model, meet = Twice(), Barrier(2, timeout=60)

    def paused():
        with edits_paused(model):
            meet.wait()
            found = model(torch.ones(1)).item()
            meet.wait()
        return found

    def edited():
        meet.wait()
        found = model(torch.ones(1)).item()
        meet.wait()
        return found

    with plus(1.0, model), ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in (pool.submit(paused), pool.submit(edited))] == [2, 4]


def test_a_pass_ends_where_a_hook_says_so():
    model = toys.make("llama")
    seen = []

    def see(layer, tensor, stop):
        seen.append(layer)
        if layer == 2:
            stop()

    points = [(layer, Point(block, "output")) for layer, block in enumerate(toys.blocks(model))]
    with torch.no_grad(), stoppable() as stop, watch(points, lambda layer, tensor: see(layer, tensor, stop)):
        model(IDS)
        pytest.fail("went on")
    assert seen == [0, 1, 2]
    assert n_hooks(model) == 0
    with stoppable():
        pass  # nobody has to stop


def test_only_the_context_that_is_meant_ends():
    reached = []
    with stoppable() as outer:
        with stoppable():
            outer()
        reached.append("between")
    with stoppable():
        with stoppable() as inner:
            inner()
        reached.append("after the inner one")
    assert reached == ["after the inner one"]
    with pytest.raises(RuntimeError, match="real"), stoppable():
        raise RuntimeError("real")
