import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
)

import toys
from melayer.errors import ArchitectureError
from melayer.model import decoder, wiring
from melayer.model.hooks import Point, edit, watch

IDS = torch.tensor([[5, 9, toys.X, 12, 7], [8, 8, 3, 4, 40]])


def sites_of(model: nn.Module, decoder: decoder.Decoder) -> dict[tuple[int, str], torch.Tensor]:
    seen: dict[tuple[int, str], torch.Tensor] = {}
    points = [((b.layer, site), point) for b in decoder.blocks for site, point in b.sites.items()]
    with torch.no_grad(), watch(points, lambda key, tensor: seen.__setitem__(key, tensor)):
        model(IDS, use_cache=False)
    return seen


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_residual_identities(family):
    model = toys.make(family)
    decoder = wiring.read(model)
    seen = sites_of(model, decoder)
    assert decoder.n_layers == toys.N_LAYERS
    assert decoder.d_model == toys.D_MODEL
    for block in decoder.blocks:
        at = {site: seen[block.layer, site] for site in block.sites}
        close = {"rtol": 1e-5, "atol": 1e-5}
        if family in toys.PARALLEL:
            assert "mid" not in at
            torch.testing.assert_close(at["block_out"], at["block_in"] + at["attn_out"] + at["ffn_out"], **close)
        else:
            if "attn_out" in at:
                torch.testing.assert_close(at["mid"], at["block_in"] + at["attn_out"], **close)
            torch.testing.assert_close(at["block_out"], at["mid"] + at["ffn_out"], **close)
        assert ("attn_in" in at) == ("attn_out" in at) == (block.attention is not None)
        assert ("ffn_act" in at) == (family not in toys.EXPERTS)
        if block.layer:
            assert torch.equal(at["block_in"], seen[block.layer - 1, "block_out"])


@pytest.mark.parametrize("family", toys.HYBRID)
def test_a_hybrid_has_attention_sites_where_there_is_attention(family):
    model = toys.make(family)
    softmax = [b.layer for b in wiring.read(model).blocks if "attn_in" in b.sites]
    assert softmax == [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert 0 < len(softmax) < toys.N_LAYERS


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_site_moves_the_output(family):
    # A site whose change does not reach the logits is not the site that it is taken for.
    model = toys.make(family)
    decoder = wiring.read(model)
    ids = IDS[:1]
    with torch.no_grad():
        plain = model(ids).logits
        for site, point in decoder.blocks[3].sites.items():

            def changed(tensor):
                # Not a constant, which LayerNorm would take out again.
                return tensor + torch.linspace(0, 1, tensor.shape[-1])

            def hook(module, args, kwargs, output=None, point=point):
                if point.side == "output":
                    return changed(output) if isinstance(output, torch.Tensor) else (changed(output[0]), *output[1:])
                if args:
                    return (changed(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

            register = (
                point.module.register_forward_pre_hook if point.side == "input" else point.module.register_forward_hook
            )
            handle = register(hook, with_kwargs=True)
            moved = model(ids).logits
            handle.remove()
            assert not torch.allclose(plain, moved, atol=1e-6), site


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_the_ffn_is_read_as_gate_up_down(family):
    model = toys.make(family)
    decoder = wiring.read(model)
    seen = sites_of(model, decoder)
    ffn = decoder.blocks[0].ffn
    assert ffn is not None
    if family in toys.EXPERTS:
        assert ffn.kind == "experts"
        return
    assert ffn.kind == ("plain" if family.startswith(("gpt2", "gpt_neox")) else "gated")
    assert ffn.down is not None
    assert ffn.up is not None
    x, act = seen[0, "ffn_in"], seen[0, "ffn_act"]
    activation = next(m for m in ffn.module.modules() if not list(m.parameters()) and "rop" not in type(m).__name__)

    def bias(projection):
        found = getattr(projection.module, "bias", None)
        return 0 if found is None else found

    up = x @ ffn.up.weight().T + bias(ffn.up)
    if ffn.gate is None:
        torch.testing.assert_close(act, activation(up), rtol=1e-5, atol=1e-5)
    else:
        gate = x @ ffn.gate.weight().T
        torch.testing.assert_close(act, activation(gate) * up, rtol=1e-5, atol=1e-5)
    assert ffn.down.weight().shape == (toys.D_MODEL, toys.D_FF)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_gamma_is_the_effective_scale(family):
    model = toys.make(family)
    decoder = wiring.read(model)
    norms = [
        norm
        for norm in (
            decoder.blocks[0].attn_norm,
            decoder.blocks[0].ffn_norm,
            decoder.blocks[0].ffn_post_norm,
            decoder.final_norm,
        )
        if norm is not None
    ]
    assert norms
    for norm in norms:
        with torch.no_grad():
            norm.module.weight.normal_(0.3, 1.0)
        offset = 1.0 if family.startswith(("gemma", "qwen3_next", "qwen3_5")) else 0.0
        torch.testing.assert_close(norm.gamma(toys.D_MODEL), norm.module.weight + offset, rtol=1e-5, atol=1e-5)


def test_gamma_where_d_model_is_odd():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    module = Gemma3RMSNorm(7)
    with torch.no_grad():
        module.weight.normal_()
    torch.testing.assert_close(decoder.Norm("n", module).gamma(7), 1 + module.weight.detach())


def test_norms_where_each_family_has_them():
    def named(family):
        block = wiring.read(toys.make(family)).blocks[0]
        norms = (block.attn_norm, block.attn_post_norm, block.ffn_norm, block.ffn_post_norm)
        return [norm and norm.name for norm in norms]

    assert named("llama") == ["input_layernorm", None, "post_attention_layernorm", None]
    assert named("olmo2") == [None, "post_attention_layernorm", None, "post_feedforward_layernorm"]
    assert named("gemma3") == [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]


def test_reading_leaves_the_model_as_it_was():
    model = toys.make("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wiring.read(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_last_block_is_read_before_the_final_norm():
    model = toys.make("llama")
    decoder = wiring.read(model)
    seen = sites_of(model, decoder)
    with torch.no_grad():
        last = model(IDS, output_hidden_states=True).hidden_states[-1]
        normed = decoder.final_norm.module(seen[toys.N_LAYERS - 1, "block_out"])
    torch.testing.assert_close(last, normed)


PRECISIONS = [
    (family, dtype)
    for family in ("llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe", "granite")
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
    if not (family in toys.EXPERTS and dtype == torch.float64)  # torch multiplies no groups of float64
]


@pytest.mark.parametrize(("family", "dtype"), PRECISIONS)
def test_another_precision_is_read_the_same_way(family, dtype):
    whole, half = (wiring.read(toys.make(family, dtype=d)) for d in (torch.float32, dtype))
    for a, b in zip(whole.blocks, half.blocks, strict=True):
        assert list(a.sites) == list(b.sites)
        assert a.parallel == b.parallel
        assert a.sites["ffn_out"].scale == b.sites["ffn_out"].scale


def test_a_multimodal_decoder_is_read_from_its_text_part():
    config = Gemma3Config(
        text_config=toys.CONFIGS["gemma3"](),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 12,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    torch.manual_seed(0)
    decoder = wiring.read(Gemma3ForConditionalGeneration(config).eval())
    assert decoder.n_layers == toys.N_LAYERS  # not the twelve of the vision tower
    assert decoder.d_model == toys.D_MODEL


def test_an_attention_only_family_has_no_ffn_sites():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=64, state_size=4)
    ).eval()
    block = wiring.read(model).blocks[0]
    assert block.ffn is None
    assert block.attention is None
    assert list(block.sites) == ["block_in", "block_out"]


# --- what is not understood ----------------------------------------------------------------------------------------


def test_an_encoder_is_refused():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    with pytest.raises(ArchitectureError, match="not a causal decoder: its first tokens change with a later one"):
        wiring.read(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(toys.CONFIGS["llama"]())
    with pytest.raises(ArchitectureError, match="holds no weights .* Load a checkpoint into it first"):
        wiring.read(model)


def test_an_unknown_part_is_refused():
    with pytest.raises(ArchitectureError, match="no part 'mlp' to name; expected one of blocks, attention, ffn"):
        wiring.read(toys.make("llama"), parts={"mlp": "mlp"})


def test_a_part_that_does_not_exist_is_named():
    with pytest.raises(ArchitectureError, match="LlamaDecoderLayer has no part 'feed', given for 'ffn'"):
        wiring.read(toys.make("llama"), parts={"ffn": "feed"})


class SplitFFN(nn.Module):
    """A block whose FFN is two loose modules, as in OPT."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn, self.norm2 = block.input_layernorm, block.self_attn, block.post_attention_layernorm
        self.fc1, self.fc2 = nn.Linear(toys.D_MODEL, 32), nn.Linear(32, toys.D_MODEL)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attn(hidden_states=self.norm(hidden_states), **kwargs)[0]
        return hidden_states + self.fc2(self.fc1(self.norm2(hidden_states)).relu())


def test_a_missing_part_is_named_with_the_argument_that_supplies_it():
    model = toys.make("llama")
    model.model.layers = nn.ModuleList(SplitFFN(block) for block in model.model.layers)
    with pytest.raises(
        ArchitectureError,
        match=r"The ffn of block 0 \(SplitFFN\) was not found: 2 parts could be it "
        r"\(fc1, fc2\)\. Name it: parts=\{'ffn': 'mlp'\}, or --part ffn=mlp",
    ):
        wiring.read(model)


class Scaled(nn.Module):
    """A block that does something to its FFN's output which no config names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn_norm, self.mix, self.ffn_norm = block.input_layernorm, block.self_attn, block.post_attention_layernorm
        self.mlp = block.mlp

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mix(hidden_states=self.attn_norm(hidden_states), **kwargs)[0]
        return hidden_states + 0.5 * self.mlp(self.ffn_norm(hidden_states))


def test_a_block_that_breaks_the_identities_is_refused():
    model = toys.make("llama")
    model.model.layers = nn.ModuleList(Scaled(block) for block in model.model.layers)
    with pytest.raises(ArchitectureError, match=r"block 0 \(Scaled\) is built in a way that is not understood"):
        wiring.read(model)


def test_a_model_without_blocks_is_refused():
    class Flat(nn.Module):
        config = AutoConfig.for_model("llama")

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ArchitectureError, match=r"Flat has no list of blocks .* --part blocks=model.layers"):
        wiring.read(Flat())


def test_named_parts_are_used():
    model = toys.make("llama")
    named = wiring.read(
        model, parts={"blocks": "model.layers", "attention": "self_attn", "ffn": "mlp", "final_norm": "model.norm"}
    )
    found = wiring.read(model)
    assert [list(b.sites) for b in named.blocks] == [list(b.sites) for b in found.blocks]
    assert named.final_norm.name == found.final_norm.name == "model.norm"


def test_what_was_read_is_returned_as_it_is():
    decoder = wiring.read(toys.make("llama"))
    assert wiring.read(decoder) is decoder


def test_a_mask_that_is_applied_is_not_seen():
    model = toys.make("llama")
    plain = wiring.read(model)
    points = [(layer, block.sites["attn_in"]) for layer, block in enumerate(plain.blocks)]
    with edit(points, lambda layer, x: torch.zeros_like(x)):
        found = wiring.read(model)
    assert [block.attn_norm.name for block in found.blocks] == [block.attn_norm.name for block in plain.blocks]


class Other(type(toys.blocks(toys.make("llama"))[0])):
    """A block of another kind."""


def test_a_block_that_does_not_run_is_refused():
    model = toys.make("llama")
    model.model.layers.append(Other(model.config, toys.N_LAYERS))  # the model runs the first `num_hidden_layers`
    with pytest.raises(ArchitectureError, match=r"Block 8 .Other. does not run on text, so how it is built is not"):
        wiring.read(model)


def test_the_pass_ends_when_every_kind_of_block_has_run():
    model = toys.make("qwen3_next")
    seen = []
    points = [(layer, Point(block, "output")) for layer, block in enumerate(toys.blocks(model))]
    with watch(points, lambda layer, x: seen.append(layer)):
        wiring.read(model)
    assert seen == [0, 1, 2, 3]  # block 3 is the first with softmax attention, and the last kind
