"""What creates the value: planted causes are named, and the shares are those of a model with other weights."""

import copy

import pytest
import torch
from torch import nn

import toys
from melayer.data.rows import encode
from melayer.measurements.criterion import STAGE_SHARE
from melayer.measurements.explain.block_on_text import BlockOnText, record_blocks
from melayer.measurements.explain.causes import MAJORITY, causes_of
from melayer.model import wiring

CONTEXT = toys.text(20, x_at=4, seed=1)
AT, LAYER, DIM, VALUE = 4, 3, 7, 3000.0
NEURON = toys.NEURON + DIM
PRE_NORM = {"gpt2": "ln_2", "gemma3": "pre_feedforward_layernorm", "gemma2": "pre_feedforward_layernorm"}
POST_NORM = ("gemma2", "gemma3", "olmo2")


def planted(family: str, **options) -> nn.Module:
    return toys.plant(toys.make(family, **options), [(LAYER, DIM, VALUE)], context=CONTEXT)


def on_text(model: nn.Module, layer: int = LAYER, token: int | None = AT, text: str = CONTEXT) -> BlockOnText:
    decoder = wiring.read(model)
    (row,) = encode(toys.tokenizer(), [text])
    (alone,) = record_blocks(decoder, row, [layer])
    read = BlockOnText.read(decoder, alone, row, token)
    assert read is not None
    return read


def write_of(model: nn.Module, dim: int = DIM) -> float:
    """What the FFN adds to the residual stream in a dimension, in a pass of the whole model."""
    block = toys.blocks(model)[LAYER]
    module = toys.ffn_post_norm(block) or toys.ffn(block)
    seen = []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(toys.tokenizer()(CONTEXT, return_tensors="pt")["input_ids"], use_cache=False)
    handle.remove()
    out = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    return out.reshape(-1, toys.D_MODEL)[AT, dim].item() * getattr(block, "residual_multiplier", 1.0)


# --- exact shares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("token", [AT, 9])
def test_the_branches_add_what_the_block_adds(family, token):
    causes = causes_of(on_text(planted(family), token=token))
    assert causes.attn_share + causes.ffn_share == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_what_each_creates_alone_and_jointly_is_the_whole(family):
    causes = causes_of(on_text(planted(family)))
    parts = (causes.ffn_alone, causes.gamma_alone, causes.post_gamma_alone, causes.jointly)
    assert sum(part or 0.0 for part in parts) == pytest.approx(1.0, abs=1e-6)
    assert (causes.post_gamma_alone is None) == (family not in POST_NORM)
    assert (causes.gamma_alone is None) == (family == "olmo2")  # it has no norm before the FFN


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "granite", "gemma3", "mixtral", "gpt_oss"])
def test_each_share_is_that_of_a_model_with_other_weights(family):
    model = planted(family)
    norm = PRE_NORM.get(family, "post_attention_layernorm")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Gamma and the neuron's weights both do some of it.
        getattr(toys.blocks(model)[LAYER], norm).weight += torch.rand(toys.D_MODEL, generator=generator)
        getattr(toys.blocks(model)[LAYER], norm).weight[toys.LISTEN] += 4.0
    causes = causes_of(on_text(model))
    whole = write_of(model)

    def left(*changes) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for change in changes:
                change(toys.blocks(other)[LAYER])
        return write_of(other) / whole

    def flat_pre(block):
        getattr(block, norm).weight.fill_(getattr(block, norm).weight.mean())

    def flat_post(block):
        post = toys.ffn_post_norm(block)
        if post is not None:
            post.weight.fill_(post.weight.mean())

    def ordinary(block):
        for readers, write in toys._dense_parts(block):
            for matrix, dim in [(reader, 1) for reader in readers] + [(write, 0)]:
                norms = matrix.norm(dim=dim, keepdim=True)
                matrix *= (norms.median() / norms).clamp(max=1)

    none = left(flat_pre, ordinary, flat_post)
    assert causes.ffn_alone == pytest.approx(left(flat_pre, flat_post), rel=1e-3, abs=1e-4)
    assert causes.gamma_alone == pytest.approx(left(ordinary, flat_post) - none, rel=1e-2, abs=1e-4)
    if family == "gemma3":
        assert causes.post_gamma_alone == pytest.approx(left(flat_pre, ordinary) - none, rel=1e-2, abs=1e-4)


# --- planted causes --------------------------------------------------------------------------------------------------


def set_neuron(gamma: float, rows: float, write: float) -> nn.Module:
    """A Llama whose planted neuron has this gamma on the dimension that it listens to, row norms and write."""
    model = planted("llama")
    block = toys.blocks(model)[LAYER]
    with torch.no_grad():
        block.post_attention_layernorm.weight[toys.LISTEN] = gamma
        for name in ("gate_proj", "up_proj"):
            getattr(block.mlp, name).weight[NEURON, toys.LISTEN] = rows
        block.mlp.down_proj.weight[DIM, NEURON] = write
        block.mlp.down_proj.weight[DIM, NEURON] *= VALUE / write_of(model)
    return model


@pytest.mark.parametrize(
    ("gamma", "rows", "write", "attribution"),
    [(1.0, 3.0, 9.0, "ffn"), (27.0, 0.4, 0.4, "gamma"), (10.0, 0.4, 3.0, "joint")],
)
def test_the_planted_cause_is_named(gamma, rows, write, attribution):
    causes = causes_of(on_text(set_neuron(gamma, rows, write)))
    assert causes.attribution == attribution
    shares = {"ffn": causes.ffn_alone, "gamma": causes.gamma_alone, "joint": causes.jointly}
    assert max(shares, key=shares.get) == attribution
    assert shares[attribution] >= MAJORITY


@pytest.mark.parametrize("family", POST_NORM)
def test_a_planted_post_norm_is_named(family):
    assert causes_of(on_text(planted(family))).attribution == "post_gamma"


def test_attention_is_named_and_the_ffn_not_asked():
    text = toys.text(20, x_at=0, seed=1)
    model = toys.plant(toys.make("llama"), [(LAYER, DIM, 1e-3)], context=text)
    attention = toys.blocks(model)[LAYER].self_attn
    with torch.no_grad():
        attention.v_proj.weight[0] = 0
        attention.v_proj.weight[0, toys.LISTEN] = 3.0
        attention.o_proj.weight[:, 0] = 0
        attention.o_proj.weight[DIM, 0] = VALUE / 24
    causes = causes_of(on_text(model, token=0, text=text))
    assert causes.attribution == "attention"
    assert causes.attn_share == pytest.approx(1.0, abs=1e-3)
    assert (causes.ffn_alone, causes.gamma_alone, causes.jointly) == (None, None, None)


# --- nothing to name -------------------------------------------------------------------------------------------------


def test_what_stands_there_already_has_no_cause_here():
    text = on_text(planted("llama"), layer=5)
    assert abs(text.at("block_out") - text.at("block_in")) < STAGE_SHARE * VALUE
    causes = causes_of(text)
    assert causes.attribution == "passed on"
    assert (causes.ffn_alone, causes.gamma_alone, causes.jointly) == (None, None, None)


class Opaque(nn.Module):
    """An FFN that does not show its parts."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = nn.ModuleList([inner])

    def forward(self, x):
        return self.inner[0](x)


def test_without_known_neurons_only_the_ffn_can_be_told_from_the_rest():
    model = set_neuron(27.0, 0.4, 0.4)  # gamma does it, which cannot be told without the neurons
    block = toys.blocks(model)[LAYER]
    block.mlp = Opaque(block.mlp)
    text = on_text(model)
    assert text.neurons is None
    causes = causes_of(text)
    assert causes.ffn_alone < 0.05
    assert (causes.gamma_alone, causes.post_gamma_alone, causes.jointly) == (None, None, None)
    assert causes.attribution == "unknown"
    alone = planted("llama")
    toys.blocks(alone)[LAYER].mlp = Opaque(toys.blocks(alone)[LAYER].mlp)
    assert causes_of(on_text(alone)).attribution == "ffn"


def test_without_a_token_the_largest_is_followed():
    text = on_text(planted("llama"), token=None)
    assert (text.token, text.dim) == (AT, DIM)
    assert text.at("block_out") == pytest.approx(VALUE, rel=1e-2)


def test_what_is_not_finite_is_not_read():
    model = planted("llama")
    with torch.no_grad():
        toys.blocks(model)[LAYER].mlp.down_proj.weight[20] = float("nan")
    decoder = wiring.read(model)
    (row,) = encode(toys.tokenizer(), [CONTEXT])
    (alone,) = record_blocks(decoder, row, [LAYER])
    assert BlockOnText.read(decoder, alone, row, AT) is None
