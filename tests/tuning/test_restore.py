"""A model is as it was after a trainer had it: all that trainers do to one, one by one and through TRL itself."""

import copy

import pytest
import torch
from torch import nn

import small_runs
import toys
from melayer.tuning import restore
from melayer.tuning.restore import restored


def observed(model):
    """All of a model that can be told apart, weights included, objects by which they are."""
    modules = {
        name: {key: _identity(value) for key, value in vars(module).items()} for name, module in model.named_modules()
    }
    configs = [c and c.to_dict() for c in (model.config, model.model.config, model.generation_config)]
    parameters = {name: (id(p), p.requires_grad, p.grad, p.dtype) for name, p in model.named_parameters()}
    return modules, configs, parameters, [type(module) for module in model.modules()]


def _identity(value):
    if isinstance(value, dict):
        return id(value), {key: id(item) for key, item in value.items()}
    if isinstance(value, (list, set)):
        return id(value), sorted(map(str, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[toys.X, 5, 6, 7]])).logits


def forward(model):
    model.forward = lambda *args, **options: None
    model.model.layers[2].mlp.forward = lambda hidden: hidden * 0


def hooks(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: None)
    model.model.layers[1].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    model.model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)


def config(model):
    model.config.use_cache = False
    model.config.rope_parameters["rope_theta"] = 1.0
    model.config.something = "new"
    model.generation_config.pad_token_id = 3
    model.generation_config.disable_compile = True


def another_config(model):
    model.config = copy.deepcopy(model.config)
    model.config.use_cache = False
    model.generation_config = None


def modes(model):
    model.eval()
    model.model.layers[0].train()
    model.model.layers[1].gradient_checkpointing = True


def requires_grad(model):
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.lm_head.weight.requires_grad = True
    logits_with_grad = model(torch.tensor([[toys.X, 5, 6, 7]])).logits
    logits_with_grad.sum().backward()
    assert model.lm_head.weight.grad is not None


def modules(model):
    model.model.layers[3].mlp.up_proj = nn.Linear(2, 2)
    model.model.layers[3].extra = nn.Identity()
    del model.model.layers[4].mlp
    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])


def tensors(model):
    layer = model.model.layers[0]
    layer.self_attn.q_proj.weight = nn.Parameter(torch.zeros(2, 2))
    layer.register_buffer("extra", torch.zeros(1))
    model.model.rotary_emb.inv_freq = torch.zeros(1)


def adapter(model):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert any("lora_A" in name for name, _ in model.named_parameters())
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))


def attributes(model):
    model.is_parallelizable = "set"
    del model.model.layers[0].self_attn.scaling
    model.model.layers[5].self_attn.layer_idx = 0


CHANGES = [forward, hooks, config, another_config, modes, requires_grad, modules, tensors, adapter, attributes]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_everything_is_put_back(change, fails):
    model = small_runs.model().train()
    own = model.model.layers[6].register_forward_hook(lambda module, args, output: None)
    before, weights, expected = observed(model), copy.deepcopy(model.state_dict()), logits(model)
    try:
        with restored(model):
            change(model)
            assert observed(model) != before  # there is something to put back
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert observed(model) == before
    assert model.config is model.model.config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    own.remove()
    assert small_runs.n_hooks(model) == 0


def test_what_was_learned_stays_and_gradients_go():
    model = small_runs.model()
    name, parameter = next(iter(model.named_parameters()))
    with restored(model):
        with torch.no_grad():
            parameter.add_(1.0)
        parameter.grad = torch.ones_like(parameter)
        learned = parameter.detach().clone()
    assert torch.equal(dict(model.named_parameters())[name], learned)
    assert parameter.grad is None


def test_handles_of_hooks_still_remove_them():
    model = small_runs.model()
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with restored(model):
        vars(model.model.layers[0])["_forward_hooks"] = {}  # as if they were cleared
        logits(model)
    assert calls == []
    logits(model)
    assert calls == [1]
    handle.remove()
    logits(model)
    assert calls == [1]


def test_a_config_within_a_config():
    """Models for more than text have one; the decoder's own config is the very object inside of the whole's."""
    model = small_runs.model()
    model.config.inner = copy.deepcopy(model.config)
    model.model.config = model.config.inner
    with restored(model):
        model.model.config.use_cache = False
    assert model.model.config is model.config.inner
    assert model.config.inner.use_cache is True


def test_a_sharded_model_is_left_as_it_is(monkeypatch):
    model = small_runs.model()
    monkeypatch.setattr(restore, "_sharded", lambda model: True)
    with restored(model):
        model.train()
        model.config.use_cache = False
    assert model.training
    assert model.config.use_cache is False


def test_how_sharding_is_recognised():
    model = small_runs.model()
    assert not restore._sharded(model)
    model.lm_head.weight.ds_id = 1  # DeepSpeed's mark
    assert restore._sharded(model)
    model.lm_head = type("FullyShardedDataParallel", (nn.Identity,), {})()
    assert restore._sharded(model)
