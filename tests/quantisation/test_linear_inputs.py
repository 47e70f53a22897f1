"""Which tensors the linear maps of the blocks read, held against what each map is given."""

import pytest
import torch
from torch import nn

import toys
from melayer.errors import InputError
from melayer.model import wiring
from melayer.quantisation.linear_inputs import find_linear_inputs, joined, readers


def of(model):
    return find_linear_inputs(wiring.read(model))


def is_map(module):
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def read_by_hand(model, ids):
    """{name of a map in the blocks: the very tensor that it reads}, of those that read every token in its place."""
    read, handles = {}, []
    inside = {module for block in toys.blocks(model) for module in block.modules()}
    for name, module in model.named_modules():
        if module in inside and is_map(module):
            handles.append(
                module.register_forward_pre_hook(lambda module, args, name=name: read.__setitem__(name, args[0]))
            )
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: x for name, x in read.items() if x.shape[:-1] == ids.shape or x.shape[0] == ids.numel()}


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_map_that_reads_every_token_is_there_once(family):
    model = toys.make(family)
    read = read_by_hand(model, torch.tensor([[5, 6, 7, 8, 9]]))
    found = of(model).inputs
    names = [name for at in found for name in at.names]
    assert len(names) == len(set(names))
    assert set(names) == set(read)
    modules = dict(model.named_modules())
    for at in found:
        assert all(is_map(modules[name]) for name in at.names)
        assert all(name.endswith(path) for name, path in zip(at.names, at.paths, strict=True))
        assert {id(read[name]) for name in at.names} == {id(read[at.names[0]])}  # the very same tensor
        assert at.width == read[at.names[0]].shape[-1]
    first = [at.names[0] for at in found]
    assert len({id(read[name]) for name in first}) == len(first)
    assert [at.layer for at in found] == sorted(at.layer for at in found)
    assert not any("head" in name for name in names)


def test_a_llama_block_has_four():
    paths = [at.paths for at in of(toys.make("llama")).inputs if at.layer == 2]
    assert paths == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert joined(paths[0]) == "self_attn.q_proj, k_proj, v_proj"
    decoder = wiring.read(toys.make("llama"))
    inputs = find_linear_inputs(decoder).inputs
    points = list(readers(decoder, inputs))
    assert len(points) == 7 * 8
    modules = dict(decoder.model.named_modules())
    assert [(place, point.module) for place, point in points] == [
        (place, modules[name]) for place, at in enumerate(inputs) for name in at.names
    ]
    assert {point.side for _, point in points} == {"input"}


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_what_is_left_out_is_said(family):
    notes = " ".join(of(toys.make(family)).notes)
    assert ("What the experts of" in notes) == (family in toys.EXPERTS)


def test_hooks_and_training_are_as_before():
    model = toys.make("llama").train()
    of(model)
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_quantised_model_is_refused():
    said = r"weights of this model are quantised already.*Give the checkpoint with whole weights"
    model = toys.make("llama")
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(InputError, match=said):
        of(model)
    model = toys.make("llama")
    down = toys.ffn(toys.blocks(model)[0]).down_proj
    packed = nn.Parameter(torch.zeros(down.weight.shape, dtype=torch.int8), requires_grad=False)
    decoder = wiring.read(model)
    down.weight = packed
    with pytest.raises(InputError, match=said):
        find_linear_inputs(decoder)


def test_an_adapter_is_refused_until_it_is_merged():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(toys.make("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match=r"An adapter is attached .*Merge it first: model.merge_and_unload"):
        of(model)
    assert len(of(model.merge_and_unload()).inputs) == 4 * 8
