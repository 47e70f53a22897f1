"""The neurons of an FFN: what they write is what the FFN returns, and scaling them is changing their weights."""

import copy

import pytest
import torch
from torch import nn

import toys
from melayer.data.rows import encode
from melayer.measurements.explain.block_on_text import BlockOnText, record_blocks
from melayer.measurements.explain.expert_neurons import find_experts
from melayer.measurements.explain.ffn_neurons import read_neurons
from melayer.measurements.explain.neurons import Neurons, Scale, dense_neurons
from melayer.measurements.explain.write import drivers, experts
from melayer.model import wiring
from melayer.model.decoder import Projection
from melayer.model.hooks import Point

CONTEXT = toys.text(20, x_at=4, seed=1)
AT, LAYER, DIM, VALUE = 4, 3, 7, 3000.0
NEURON = toys.NEURON + DIM
DENSE = tuple(family for family in toys.FAMILIES if family not in toys.EXPERTS)


def planted(family: str, **options) -> nn.Module:
    return toys.plant(toys.make(family, **options), [(LAYER, DIM, VALUE)], context=CONTEXT)


def on_text(model: nn.Module, layer: int = LAYER, token: int = AT) -> BlockOnText:
    decoder = wiring.read(model)
    (row,) = encode(toys.tokenizer(), [CONTEXT])
    (alone,) = record_blocks(decoder, row, [layer])
    text = BlockOnText.read(decoder, alone, row, token)
    assert text is not None
    return text


def returned(model: nn.Module, layer: int = LAYER, token: int = AT) -> torch.Tensor:
    """[d_model] what the FFN returns for a token, in a pass of the whole model."""
    seen = {}

    def keep(module, args, out):
        seen["out"] = (out if isinstance(out, torch.Tensor) else out[0]).reshape(-1, toys.D_MODEL)[token]

    handle = toys.ffn(toys.blocks(model)[layer]).register_forward_hook(keep)
    with torch.no_grad():
        model(toys.tokenizer()(CONTEXT, return_tensors="pt")["input_ids"], use_cache=False)
    handle.remove()
    return seen["out"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


# --- what they write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("layer", [LAYER, 5])
def test_together_they_write_what_the_ffn_returns_in_every_dimension(family, layer):
    model = planted(family)
    parts = on_text(model, layer).neurons.parts
    close(torch.stack([part.written() for part in parts]).sum(0), returned(model, layer))


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_their_contributions_and_the_biases_add_up_to_the_write(family):
    model = planted(family)
    text = on_text(model)
    assert text.dim == DIM
    contributions = text.contributions()
    total = sum(value for value, _, _ in contributions) + text.bias()
    assert total == pytest.approx(returned(model)[DIM].item(), rel=1e-4)
    sizes = [abs(value) for value, _, _ in contributions]
    assert sizes == sorted(sizes, reverse=True)
    assert len(contributions) == sum(len(part.act) for part in text.neurons.parts)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_the_planted_neuron_is_the_heaviest(family):
    contributions = on_text(planted(family)).contributions()
    planted_ones = len({expert for _, expert, _ in contributions})  # one in every expert that is visited
    assert {neuron for _, _, neuron in contributions[:planted_ones]} == {NEURON}
    assert abs(contributions[planted_ones][0]) < 1e-3 * abs(contributions[0][0])


def test_an_ordinary_token_has_no_neuron_that_writes_it_all():
    contributions = on_text(toys.make("llama"), token=2).contributions()
    assert abs(contributions[0][0]) < 0.5 * sum(abs(value) for value, _, _ in contributions)


@pytest.mark.parametrize("family", DENSE)
def test_what_a_dense_ffn_reads_drives_its_neurons_exactly(family):
    model = planted(family)
    text = on_text(model)
    (part,) = text.neurons.parts
    x = text.activations["ffn_in"][AT]
    pre = {name: getattr(part, name).float() @ x for name in ("gate", "up") if getattr(part, name) is not None}
    pre = {name: values + part.biases.get(name, 0.0) for name, values in pre.items()}
    act = toys.ffn(toys.blocks(model)[LAYER])
    activation = getattr(act, "act_fn", None) or getattr(act, "act", None) or act.activation_fn
    with torch.no_grad():
        expected = activation(pre["gate"]) * pre["up"] if "gate" in pre else activation(pre["up"])
    close(part.act, expected)


def driven(family: str) -> nn.Module:
    """A planted model in which other dimensions than the planted one drive the neuron, too."""
    model = planted(family)
    with torch.no_grad():
        for readers, _ in toys._dense_parts(toys.blocks(model)[LAYER]):
            for reader in readers:
                reader[NEURON] += 0.05 * torch.randn(toys.D_MODEL, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral", "gpt_oss", "qwen3_next"])
def test_drivers_are_the_largest_terms_of_the_top_neurons_pre_activations(family):
    text = on_text(driven(family))
    _, expert, neuron = text.contributions()[0]
    assert neuron == NEURON
    part = next(part for part in text.neurons.parts if part.expert == expert)
    x = text.activations["ffn_in"][AT]
    for name, matrix in (("gate", part.gate), ("up", part.up)):
        rows = [row for row in drivers(text) if row.projection == name]
        added = torch.zeros(0) if matrix is None else x * matrix[NEURON].float()
        assert [row.dim for row in rows] == added.abs().topk(min(5, len(added))).indices.tolist()
        assert [row.contribution for row in rows] == pytest.approx(added[[row.dim for row in rows]].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "projections"),
    [
        ("llama", {"gate": ("gate_proj", NEURON), "up": ("up_proj", NEURON)}),
        ("phi3", {"gate": ("gate_up_proj", NEURON), "up": ("gate_up_proj", toys.D_FF + NEURON)}),
        ("gpt2", {"up": ("c_fc", NEURON)}),
        ("gpt_neox", {"up": ("dense_h_to_4h", NEURON)}),
    ],
)
def test_shares_of_drivers_are_of_what_the_projection_returns(family, projections):
    model = driven(family)
    with torch.no_grad():
        for module in toys.ffn(toys.blocks(model)[LAYER]).modules():
            if getattr(module, "bias", None) is not None and len(module.bias) != toys.D_MODEL:
                module.bias += 1.5
    rows = drivers(on_text(model))
    for projection, (name, at) in projections.items():
        seen = []
        module = getattr(toys.ffn(toys.blocks(model)[LAYER]), name)
        handle = module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        returned(model)
        handle.remove()
        whole = seen[0].reshape(20, -1)[AT, at].item()
        for row in rows:
            if row.projection == projection:
                assert row.contribution / row.share == pytest.approx(whole, rel=1e-4)
    assert {row.projection for row in rows} == set(projections)


@pytest.mark.parametrize("family", toys.EXPERTS)
def test_experts_share_the_write_among_them(family):
    text = on_text(planted(family))
    whole = text.activations["ffn_raw"][AT, DIM].item()
    used = experts(text, whole)
    assert [use.expert for use in used] == [part.expert for part in text.neurons.parts]
    assert sum(use.share for use in used) == pytest.approx(1.0, rel=1e-4)
    assert sum(use.weight for use in used if use.expert != "shared") == pytest.approx(1.0, rel=1e-5)


# --- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_without_neurons_is_a_model_without_their_weights(family):
    model = planted(family)
    text = on_text(model)
    for n in (1, 4):
        other = copy.deepcopy(model)
        writes = toys._dense_parts(toys.blocks(other)[LAYER])
        with torch.no_grad():
            for _, expert, neuron in text.contributions()[:n]:
                writes[-1 if expert == "shared" else expert or 0][1][:, neuron] = 0
        point = Point(toys.ffn(toys.blocks(model)[LAYER]), "output")
        seen = text.alone.run(text.without(n), points={"ffn": point}, listen=text.neurons.listen)
        torch.testing.assert_close(seen["ffn"][AT], returned(other), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_oss", "qwen3_next"])
def test_scales_of_one_change_nothing(family):
    model = planted(family)
    text = on_text(model)
    edits = text.neurons.scaled(lambda part: Scale(*[torch.ones(len(part.act))] * 3))
    assert text.value(edits) == pytest.approx(text.at("block_out"), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_ordinary_neurons_have_at_most_the_median_norm(family):
    for part in on_text(planted(family)).neurons.parts:
        scale = part.ordinary()
        for factor, matrix, dim in ((scale.gate, part.gate, 1), (scale.up, part.up, 1), (scale.down, part.down, 0)):
            if matrix is None:
                assert factor == 1.0
                continue
            norms = matrix.float().norm(dim=dim)
            scaled = norms * factor
            assert scaled.max() <= norms.median() * (1 + 1e-5)
            small = norms <= norms.median()
            assert (factor[small] == 1).all()  # the ordinary ones stay as they are, bit for bit
            assert (factor[~small] < 1).all()


def test_some_are_removed_and_the_others_kept():
    part = on_text(planted("llama")).neurons.parts[0]
    kept = part.without([NEURON, 2]).down
    assert kept.tolist() == [float(neuron not in (NEURON, 2)) for neuron in range(toys.D_FF)]
    assert (part.without([]).down == 1).all()


# --- not at all ------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A gated FFN by its parts, which returns something else than they write."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj
        self.act_fn = inner.act_fn

    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_an_ffn_that_returns_something_else_has_no_neurons():
    model = planted("llama")
    block = toys.blocks(model)[LAYER]
    block.mlp = Doubled(block.mlp)
    text = on_text(model)
    assert text.neurons is None
    assert text.contributions() == []
    assert text.bias() == 0
    assert text.ordinary() is None
    assert experts(text, 1.0) == ()


def test_weights_that_are_elsewhere_are_not_read():
    model = planted("llama")
    text = on_text(model)
    down = toys.blocks(model)[LAYER].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to("meta"), requires_grad=False)
    assert read_neurons(text.alone, text.block.ffn, AT, text.activations) is None


def test_what_is_no_set_of_experts_is_not_taken_for_one():
    assert find_experts(toys.ffn(toys.blocks(toys.make("llama"))[0])) == []
    (found,) = find_experts(toys.ffn(toys.blocks(toys.make("mixtral"))[0]))
    assert not found.interleaved
    (found,) = find_experts(toys.ffn(toys.blocks(toys.make("gpt_oss"))[0]))
    assert found.interleaved


def test_dense_neurons_write_with_their_bias():
    generator = torch.Generator().manual_seed(0)
    up, down = nn.Linear(4, 6), nn.Linear(6, 4)
    act = torch.randn(6, generator=generator)
    part = dense_neurons(None, Projection("up", up), Projection("down", down), act)
    assert isinstance(part, Neurons)
    torch.testing.assert_close(part.written(), down(act).detach())
    torch.testing.assert_close(part.written_by(2 * act), 2 * (down(act) - down.bias).detach())
