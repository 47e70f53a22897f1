import copy
import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

import melayer
import toys
from melayer.errors import ArchitectureError, InputError
from melayer.measurements.explain.explain import explain
from melayer.measurements.explain.report import section
from melayer.measurements.explain.table import show_explain
from melayer.model import wiring
from melayer.model.hooks import watch

LAYER, DIM, VALUE = 3, 7, 3000.0
NEURON = toys.NEURON + DIM
CONTEXT = toys.text(20, x_at=4, seed=1)
TEXTS = [CONTEXT, toys.text(30, x_at=4, seed=2), toys.text(12, x_at=4, seed=3)]
POST_NORM = ("gemma2", "gemma3", "olmo2")


def planted(family: str, **options) -> nn.Module:
    return toys.plant(toys.make(family, **options), [(LAYER, DIM, VALUE)], context=CONTEXT)


def explained(model: nn.Module, texts=(CONTEXT,), **options):
    return explain(model, toys.tokenizer(), texts=list(texts), **options)


def ids_of(text: str) -> torch.Tensor:
    return toys.tokenizer()(text, return_tensors="pt")["input_ids"]


def block_value(model: nn.Module, layer: int = LAYER, text: str = CONTEXT, token: int = 4) -> float:
    """The scalar at the block's output in a pass of the whole model: the other route to what explain says."""
    with toys.capture(toys.blocks(model)[layer]) as seen, torch.no_grad():
        model(ids_of(text), use_cache=False)
    return seen["out"][0, token, DIM].item()


def ffn_output(model: nn.Module, layer: int = LAYER) -> torch.Tensor:
    seen = {}

    def keep(module, args, out):
        seen["out"] = out if isinstance(out, torch.Tensor) else out[0]

    handle = toys.ffn(toys.blocks(model)[layer]).register_forward_hook(keep)
    with torch.no_grad():
        model(ids_of(CONTEXT), use_cache=False)
    handle.remove()
    return seen["out"].reshape(-1, toys.D_MODEL)[4]


def set_neuron(model: nn.Module, gamma: float, rows: float, write: float) -> nn.Module:
    """The planted neuron of a Llama with this gamma on the dimension that it listens to, row norms and write."""
    block = toys.blocks(model)[LAYER]
    with torch.no_grad():
        block.post_attention_layernorm.weight[toys.LISTEN] = gamma
        for name in ("gate_proj", "up_proj"):
            getattr(block.mlp, name).weight[NEURON, toys.LISTEN] = rows
        block.mlp.down_proj.weight[DIM, NEURON] = write
        block.mlp.down_proj.weight[DIM, NEURON] *= VALUE / block_value(model)
    return model


# --- planted truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in toys.FAMILIES if f not in POST_NORM])
def test_an_ffn_that_does_it_alone_is_recognised(family):
    (layer,) = explained(planted(family)).layers
    causes = layer.causes
    assert (layer.layer, layer.d_star, layer.token_index, layer.token) == (LAYER, DIM, 4, "X")
    assert layer.value == pytest.approx(VALUE, rel=1e-2)
    assert causes.attribution == "ffn"
    assert causes.ffn_alone > 0.95
    assert causes.ffn_share == pytest.approx(1.0, abs=1e-3)
    assert abs(causes.gamma_alone) < 0.05
    assert abs(causes.jointly) < 0.05
    assert layer.relative("no_top_10") == pytest.approx(0.0, abs=1e-3)
    assert layer.relative("gamma_flat_1.0") > 0.95
    assert "the FFN alone creates it" in layer.sentence


def test_gamma_that_does_it_alone_is_recognised():
    model = set_neuron(planted("llama"), gamma=27.0, rows=0.4, write=0.4)
    down = toys.blocks(model)[LAYER].mlp.down_proj.weight
    assert down[:, NEURON].norm() < 1.2 * down.norm(dim=0).median()  # the neuron is an ordinary one
    (layer,) = explained(model).layers
    assert layer.causes.attribution == "gamma"
    assert layer.causes.gamma_alone > 0.7
    assert layer.causes.ffn_alone < 0.05
    assert layer.relative("gamma_flat_1.0") < 0.05
    assert layer.relative("ordinary_neurons") > 0.7
    assert "RMSNorm's gamma alone creates it" in layer.sentence
    listening = {driver.projection: driver for driver in reversed(layer.drivers)}
    for driver in listening.values():
        assert (driver.dim, driver.gamma) == (toys.LISTEN, pytest.approx(27.0))
        assert driver.share == pytest.approx(1.0)


@pytest.mark.parametrize("family", POST_NORM)
def test_the_gamma_of_a_post_norm_is_recognised(family):
    (layer,) = explained(planted(family)).layers
    assert layer.causes.attribution == "post_gamma"
    assert layer.causes.post_gamma_alone > 0.8
    assert layer.relative("post_gamma_flat_1.0") < 0.2
    assert [step.step for step in layer.budget][-2:] == ["post-norm", "total"]
    assert ("norm" in [step.step for step in layer.budget]) == (family != "olmo2")
    assert (layer.relative("gamma_flat_1.0") is None) == (family == "olmo2")


def test_norm_and_ffn_jointly_are_recognised():
    (layer,) = explained(set_neuron(planted("llama"), gamma=10.0, rows=0.4, write=3.0)).layers
    assert layer.causes.attribution == "joint"
    assert layer.causes.jointly > 0.7
    assert layer.relative("gamma_flat_1.0") < 0.1
    assert layer.relative("ordinary_neurons") < 0.25
    assert "norm and FFN create most of it jointly" in layer.sentence  # 86 %


def by_attention(text: str) -> nn.Module:
    model = toys.plant(toys.make("llama"), [(LAYER, DIM, 1e-3)], context=text)
    attention = toys.blocks(model)[LAYER].self_attn
    with torch.no_grad():
        attention.v_proj.weight[0] = 0
        attention.v_proj.weight[0, toys.LISTEN] = 3.0
        attention.o_proj.weight[:, 0] = 0
        attention.o_proj.weight[DIM, 0] = VALUE / 24
    return model


def test_attention_is_recognised():
    text = toys.text(20, x_at=0, seed=1)
    (layer,) = explained(by_attention(text), [text]).layers
    assert layer.value == pytest.approx(VALUE, rel=1e-2)
    assert layer.causes.attribution == "attention"
    assert layer.causes.attn_share == pytest.approx(1.0, abs=1e-3)
    assert layer.relative("no_attention") == pytest.approx(0.0, abs=1e-3)
    assert layer.relative("no_ffn") == pytest.approx(1.0, abs=1e-3)
    assert layer.causes.ffn_alone is None
    assert "without attention 0.0%" in layer.sentence


def test_a_block_that_passes_it_on_is_not_blamed():
    (layer,) = explained(planted("llama"), layers=[5]).layers
    assert layer.causes.attribution == "passed on"
    assert layer.value == pytest.approx(layer.value_in, rel=1e-3)
    assert layer.causes.ffn_alone is None
    assert "stands there already and the block passes it on" in layer.sentence


def test_a_block_that_takes_it_away_is_said_to_do_so():
    model = toys.plant(toys.make("llama"), [(1, DIM, 2000.0), (2, DIM, -1500.0)], context=CONTEXT)
    (layer,) = explained(model, layers=[2]).layers
    assert layer.erases
    assert layer.causes.attribution == "ffn"
    assert (layer.value_in, layer.value) == (pytest.approx(2000, rel=1e-3), pytest.approx(500, rel=1e-3))
    assert layer.relative("no_ffn") == pytest.approx(4, rel=1e-3)
    assert "the FFN alone lowers it (token 4 “X”, dimension 7, 2,000 to 500)" in layer.sentence


def test_every_stage_is_explained():
    model = toys.plant(toys.make("llama"), [(2, DIM, 2500.0), (4, DIM, 2500.0)], context=CONTEXT)
    result = explained(model)
    assert [layer.layer for layer in result.layers] == [2, 4]
    assert [layer.causes.attribution for layer in result.layers] == ["ffn", "ffn"]
    assert result.layers[1].relative("no_ffn") == pytest.approx(0.5, abs=0.01)
    assert result.sentence.startswith("Block 2: ")
    assert " Block 4: " in result.sentence


# --- exact sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_neurons_add_up_to_what_the_ffn_returns(family):
    model = planted(family)
    (layer,) = explained(model, top=10_000).layers
    returned = ffn_output(model)[DIM].item()
    total = sum(n.contribution for n in layer.neurons) / (1 - layer.bias_share)
    assert total == pytest.approx(returned, rel=1e-4)
    assert sum(n.share for n in layer.neurons) + layer.bias_share == pytest.approx(1.0, abs=1e-4)
    assert layer.rest_share == 0
    assert layer.super_weight == (LAYER, DIM, NEURON)
    assert layer.neurons[0].neuron == NEURON
    (few,) = explained(model, top=3).layers
    assert len(few.neurons) == 3
    assert sum(n.share for n in few.neurons) + few.bias_share + few.rest_share == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_budgets_add_up_and_are_the_norms(family):
    model = planted(family)
    result = explained(model, layers=range(toys.N_LAYERS))
    for layer in result.layers:
        linear = layer.attn_budget == ()
        assert linear == (family in toys.HYBRID and model.config.layer_types[layer.layer] == "linear_attention")
        for budget in (layer.budget, layer.attn_budget):
            for column in ("massive", "others", "excess"):
                *steps, total = [getattr(step, column) for step in budget] or [0.0]
                assert math.fsum(steps) == pytest.approx(total, abs=1e-6)
    budget = {step.step: step.massive for step in result.layers[LAYER].budget}
    assert ("experts" in budget) == (family in toys.EXPERTS)
    assert ("multiplier" in budget) == (family == "granite")
    decoder = wiring.read(model)
    point = decoder.blocks[LAYER].sites["mid" if "mid" in decoder.blocks[LAYER].sites else "block_in"]
    seen = {}
    points = [("in", point), ("out", decoder.blocks[LAYER].sites["ffn_out"])]
    with watch(points, lambda key, h: seen.update({key: h[0].norm(dim=-1)})), torch.no_grad():
        model(ids_of(CONTEXT), use_cache=False)
    others = [place for place in range(20) if place != 4]
    total = result.layers[LAYER].budget[-1]
    assert 10**total.massive == pytest.approx((seen["out"][4] / seen["in"][4]).item(), rel=1e-4)
    medians = seen["out"][others].median() / seen["in"][others].median()
    assert 10**total.others == pytest.approx(medians.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral", "gpt_oss", "qwen3_next"])
def test_drivers_are_the_pre_activations(family):
    model = planted(family)
    (layer,) = explained(model).layers
    for projection in {driver.projection for driver in layer.drivers}:
        first = next(driver for driver in layer.drivers if driver.projection == projection)
        assert first.dim == toys.LISTEN
        assert first.share == pytest.approx(1.0, abs=1e-2)
        assert first.contribution == pytest.approx(24.0, rel=0.02)
        assert first.gamma == pytest.approx(1.0)
    assert len(layer.drivers) == (5 if family in ("gpt2", "gpt_neox") else 10)


def test_directions_are_the_singular_vectors():
    model = planted("llama")
    (layer,) = explained(model).layers
    left, values, _ = torch.linalg.svd(toys.blocks(model)[LAYER].mlp.down_proj.weight)
    write = ffn_output(model)
    for direction in layer.directions:
        assert direction.singular_value == pytest.approx(values[direction.rank - 1].item(), rel=1e-4)
        cosine = (left[:, direction.rank - 1] @ write).abs() / write.norm()
        assert direction.cosine == pytest.approx(cosine.item(), abs=1e-3)
    assert layer.directions[0].cosine > 0.99


@pytest.mark.parametrize("family", toys.EXPERTS)
def test_experts_are_named_with_their_weights(family):
    (layer,) = explained(planted(family)).layers
    assert len(layer.experts) == (3 if family == "qwen3_next" else 2)
    assert ("shared" in [use.expert for use in layer.experts]) == (family == "qwen3_next")
    routed = [use for use in layer.experts if use.expert != "shared"]
    assert sum(use.weight for use in routed) == pytest.approx(1.0, abs=1e-5)
    assert sum(use.share for use in layer.experts) == pytest.approx(1.0, abs=1e-4)
    assert layer.super_weight_expert in [use.expert for use in layer.experts]


# --- counterfactuals by another route: the same change to a copy's weights ------------------------------------------


def flattened(norm: nn.Module) -> None:
    norm.weight.fill_(norm.weight.mean())


FFN_NORM = {
    "gpt2": "ln_2",
    "gpt_neox": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
}


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "gemma3", "phi3", "qwen3_moe", "gpt_oss", "qwen3_next"]
)
def test_counterfactuals_are_those_of_changed_weights(family):
    model = planted(family)
    norm_name = FFN_NORM.get(family, "post_attention_layernorm")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm = getattr(toys.blocks(model)[LAYER], norm_name)
        norm.weight += torch.rand(toys.D_MODEL, generator=generator)
        norm.weight[20] = -1.0 if family == "gemma3" else 0.0  # an effective gamma of 0
        if getattr(norm, "bias", None) is not None:
            norm.bias += torch.rand(toys.D_MODEL, generator=generator)
    (layer,) = explained(model).layers
    assert layer.value == pytest.approx(block_value(model), rel=1e-5)

    def changed(*changes) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for change in changes:
                change(toys.blocks(other)[LAYER])
        return block_value(other)

    def flat(block):
        flattened(getattr(block, norm_name))

    def removed(block):
        for neuron in layer.neurons[:2]:
            writes = toys._dense_parts(block)
            writes[-1 if neuron.expert == "shared" else neuron.expert or 0][1][:, neuron.neuron] = 0

    def ordinary(block):
        for readers, write in toys._dense_parts(block):
            for matrix, dim in [(reader, 1) for reader in readers] + [(write, 0)]:
                norms = matrix.norm(dim=dim, keepdim=True)
                matrix *= (norms.median() / norms).clamp(max=1)

    for name, changes in {
        "gamma_flat_1.0": [flat],
        "no_top_2": [removed],
        "gamma_flat+no_top_2": [flat, removed],
        "ordinary_neurons": [ordinary],
    }.items():
        found = next(row for row in layer.counterfactuals if row.name == name)
        assert found.value == pytest.approx(changed(*changes), rel=1e-3, abs=2e-3), name
        assert found.relative == pytest.approx(found.value / layer.value)
    effects = [1 - layer.relative(name) for name in ("gamma_flat+no_top_2", "gamma_flat_1.0", "no_top_2")]
    assert layer.interaction == pytest.approx(effects[0] - effects[1] - effects[2])


def test_permutations_keep_their_spread():
    model = set_neuron(planted("llama"), gamma=27.0, rows=0.4, write=0.4)
    (layer,) = explained(model, seeds=4).layers
    row = next(row for row in layer.counterfactuals if row.name == "gamma_permuted")
    assert row.lowest <= row.value <= row.highest
    assert row.highest < 0.1 * layer.value


def test_alphas_go_from_the_value_to_flat():
    (layer,) = explained(set_neuron(planted("llama"), gamma=10.0, rows=0.4, write=3.0)).layers
    shares = [layer.relative(f"gamma_flat_{alpha}") for alpha in (0.25, 0.5, 0.75, 1.0)]
    assert shares == sorted(shares, reverse=True)


# --- the model, the options, the errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "gpt_oss"])
def test_the_model_is_left_as_it_was(family):
    model = planted(family).train()
    before = copy.deepcopy(model.state_dict())
    explained(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_model_is_left_as_it_was_after_an_error():
    model = planted("llama")
    norm = toys.blocks(model)[LAYER].post_attention_layernorm
    weight = norm.weight.detach().clone()

    def odd(x):
        return nn.functional.normalize(x, dim=-1, p=1) * norm.weight

    norm.forward = odd
    with pytest.raises(ArchitectureError, match="does not compute gamma"):
        explained(model, layers=[LAYER])
    assert torch.equal(norm.weight, weight)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_half_precision(family, dtype):
    (layer,) = explained(planted(family).to(dtype)).layers
    assert layer.value == pytest.approx(VALUE, rel=0.02)
    assert layer.causes.attribution == "ffn"
    assert layer.neurons[0].neuron == NEURON
    assert sum(n.share for n in layer.neurons) + layer.bias_share + layer.rest_share == pytest.approx(1.0, abs=1e-4)


def test_the_causes_of_each_text():
    result = explained(planted("llama"), TEXTS, max_texts=2)
    (layer,) = result.layers
    assert [text.sequence for text in layer.texts] == [0, 1]
    assert all(text.causes.attribution == "ffn" for text in layer.texts)
    assert layer.texts[0].causes == layer.causes
    assert layer.sequence == 0


def test_only_texts_that_hold_are_explained():
    texts = [toys.text(20, x_at=None, seed=7), *TEXTS]
    result = explained(planted("llama"), texts, max_texts=1)
    assert result.layers[0].sequence == 1


def test_a_located_result_is_used():
    model = planted("llama")
    located = melayer.locate(model, toys.tokenizer(), texts=TEXTS, max_tokens=11)
    result = explained(model, TEXTS, located=located)
    assert result.settings["max_tokens"] == 11
    assert result.layers[0].layer == located.me_layer
    with pytest.raises(InputError, match=r"is of other texts \(3 texts, 33 tokens\) than those given \(1 texts, 11"):
        explained(model, [CONTEXT], located=located)
    with pytest.raises(InputError, match="The located result is of another model"):
        explained(toys.make("llama"), TEXTS, located=located)
    with pytest.raises(InputError, match="has another criterion than the one given"):
        explained(model, TEXTS, located=located, criterion=melayer.Criterion(min_abs=5))


def test_without_an_me_layer_there_is_nothing_to_explain():
    result = explained(toys.make("llama"))
    assert result.layers == ()
    assert result.me_layer is None
    assert result.sentence.startswith("There is no ME layer, so there is nothing to explain")
    assert section(result).parts == []
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_given_layers_need_no_me_layer(family):
    model = toys.make(family)
    result = explained(model, layers=[6, 2, 2])
    assert [layer.layer for layer in result.layers] == [2, 6]
    with toys.capture(toys.blocks(model)[6]) as seen, torch.no_grad():
        model(ids_of(CONTEXT), use_cache=False)
    layer = result.layers[1]
    out = seen["out"][0]
    assert layer.value == pytest.approx(out[layer.token_index, layer.d_star].item(), rel=1e-4)
    assert abs(layer.value) == pytest.approx(out.abs().max().item(), rel=1e-4)
    assert layer.neurons
    assert all("softmax" in note for note in layer.notes)


def test_layers_that_are_not_there():
    with pytest.raises(InputError, match=r"Layer 8 was asked for, but the model has blocks 0 to 7. Give layers"):
        explained(toys.make("llama"), layers=[8])
    with pytest.raises(InputError, match="Layer -1 was asked for"):
        explained(toys.make("llama"), layers=[-1])


@pytest.mark.parametrize("option", ["seeds", "top", "max_texts"])
def test_options_of_nothing(option):
    with pytest.raises(InputError, match=f"{option} is 0; expected at least 1"):
        explained(toys.make("llama"), **{option: 0})


def test_one_token():
    result = explained(planted("llama"), ["X"], layers=[LAYER])
    (layer,) = result.layers
    assert [step.others for step in layer.budget] == [None] * 4
    assert [step.excess for step in layer.budget] == [None] * 4
    assert "one token" in layer.notes[0]
    assert "no norms to compare" in section(result).parts[0].takeaway
    assert layer.causes.attribution == "ffn"


def test_what_is_not_finite_is_a_note():
    model = planted("llama")
    with torch.no_grad():
        toys.blocks(model)[LAYER].mlp.down_proj.weight[0, 0] = torch.nan
    result = explained(model, layers=[LAYER])
    assert result.layers == ()
    assert result.notes == ("Block 3 is not finite in text 0, and is not explained there.",)
    assert result.sentence.startswith("None of the layers could be explained")


def test_unknown_experts_are_not_guessed():
    model = planted("mixtral")
    experts = toys.ffn(toys.blocks(model)[LAYER]).experts
    forward = type(experts).forward
    # What their weights and their activation say is not what these experts do.
    experts.forward = lambda *args: 1.5 * forward(experts, *args)
    (layer,) = explained(model).layers
    assert layer.neurons == ()
    assert layer.super_weight is None
    assert "are not known" in layer.notes[0]
    assert layer.relative("no_ffn") == pytest.approx(0, abs=1e-3)
    assert layer.causes.jointly is None


# --- what people see -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen3_next", "gpt_neox"])
def test_to_dict_report_and_terminal(family):
    result = explained(planted(family), TEXTS, layers=[2, 3])
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain)[:3] == ["melayer_version", "model", "settings"]
    layer = plain["layers"][1]
    for key in ("budget", "neurons", "super_weight", "counterfactuals", "interaction", "attribution", "jointly"):
        assert key in layer
    assert layer["neurons"][0]["neuron"] == NEURON
    made = section(result)
    keys = [part.key for part in made.parts if hasattr(part, "key")]
    assert [f"explain-{what}-3" for what in ("budget", "neurons", "counterfactuals")] == keys[-3:]
    assert len(set(keys)) == len(keys)
    json.dumps([part.figure for part in made.parts if hasattr(part, "figure")], allow_nan=False)
    assert all(part.takeaway and part.reading for part in made.parts if hasattr(part, "key"))
    console = Console(file=StringIO(), width=120)
    show_explain(result, console)
    shown = console.file.getvalue()
    assert "Block 3" in shown
    assert "no_top_2" in shown
    show_explain(explained(toys.make("llama")), console)
    assert "nothing to explain" in console.file.getvalue()


# --- the demo model ------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_demo_model(demo):
    model, tokenizer, _ = demo
    result = explain(model, tokenizer, texts=["My favorite color is Dark Blue. The sky is clear today."])
    (layer,) = result.layers
    assert (layer.layer, layer.d_star, layer.token_index) == (11, 507, 0)
    assert layer.value == pytest.approx(23738, rel=0.01)
    gain = next(step for step in layer.budget if step.step == "gate and up")
    assert 10**gain.massive == pytest.approx(570, rel=0.01)
    assert 10**gain.others == pytest.approx(1.94, rel=0.01)
    assert layer.super_weight == (11, 507, 1229)
    assert layer.neurons[0].share == pytest.approx(0.725, rel=0.01)
    values = {row.name: row.value for row in layer.counterfactuals}
    assert values["no_top_2"] == pytest.approx(134, rel=0.01)
    assert values["gamma_flat_1.0"] == pytest.approx(23189, rel=0.01)
    assert layer.causes.attribution == "ffn"
    assert layer.causes.ffn_alone == pytest.approx(0.977, rel=0.01)
    assert layer.causes.jointly == pytest.approx(0.022, abs=0.005)
