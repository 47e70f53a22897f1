import pytest
import torch

import melayer
import toys
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.peak import classify

CONTEXT = toys.text(20, x_at=4, seed=1)
TEXTS = [CONTEXT, toys.text(30, x_at=4, seed=2), toys.text(12, x_at=4, seed=3)]


def located(model, texts=TEXTS, **options):
    return melayer.locate(model, toys.tokenizer(), texts=texts, **options)


# --- planted truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_a_planted_activation_is_recovered(family):
    model = toys.make(family)
    toys.plant(model, [(3, 7, 3000.0)], context=CONTEXT)
    result = located(model, [CONTEXT])
    assert result.me_layer == 3
    assert result.emergence == "single"
    row = result.blocks[3]
    assert (row.token_index, row.token, row.dim) == (4, "X", 7)
    with toys.capture(toys.blocks(model)[3]) as seen, torch.no_grad():
        model(toys.tokenizer()(CONTEXT, return_tensors="pt")["input_ids"])
    truth = seen["out"][0, 4, 7].item()
    assert row.max_abs == pytest.approx(truth, rel=1e-4)
    # An expert router may move a little when the weights of its experts do; everything else is exact.
    assert truth == pytest.approx(3000.0, rel=1e-2 if family in toys.EXPERTS else 1e-4)
    stage = result.stages[0]
    assert stage.layer == 3
    assert stage.share > 0.98
    assert stage.ffn_share == pytest.approx(stage.share, abs=0.03)
    scalars = [s for s in result.massive if s.layer == 3]
    assert [(s.token_index, s.dim) for s in scalars] == [(4, 7)]
    assert scalars[0].value == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_without_planting_none_is_found(family):
    result = located(toys.make(family))
    assert result.me_layer is None
    assert result.emergence == "none"
    assert result.massive == ()
    assert result.stages == ()
    assert result.sentence.startswith("No massive activation was found")


def test_negative_values_and_other_places_are_recovered():
    model = toys.make("llama")
    text = toys.text(25, x_at=9, seed=5)
    toys.plant(model, [(1, 40, -5000.0)], context=text)
    result = located(model, [text])
    assert result.me_layer == 1
    (scalar,) = [s for s in result.massive if s.layer == 1]
    assert (scalar.token_index, scalar.dim) == (9, 40)
    assert scalar.value == pytest.approx(-5000.0, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "qwen3_5"])
def test_staged(family):
    model = toys.make(family)
    toys.plant(model, [(2, 7, 2500.0), (4, 7, 2500.0)], context=CONTEXT)
    result = located(model, [CONTEXT])
    assert result.emergence == "staged"
    assert [stage.layer for stage in result.stages] == [2, 4]
    assert [stage.share for stage in result.stages] == pytest.approx([0.5, 0.5], abs=0.03)
    assert result.me_layer == 2


def test_gradual():
    model = toys.make("llama")
    toys.plant(model, [(layer, 7, 600.0) for layer in range(6)], context=CONTEXT)
    result = located(model, [CONTEXT])
    assert result.emergence == "gradual"
    assert [stage.layer for stage in result.stages] == list(range(6))
    assert all(stage.share == pytest.approx(1 / 6, abs=0.03) for stage in result.stages)
    assert result.peak_layer in (5, 6, 7)


def test_erased_and_reborn():
    # The early growth lasts one block: too short for a quarter of the eight.
    model = toys.make("llama")
    toys.plant(model, [(1, 7, 2000.0), (2, 7, -2000.0), (5, 7, 9000.0)], context=CONTEXT)
    result = located(model, [CONTEXT])
    assert result.blocks[1].n_holding == 1
    assert result.me_layer == 5
    assert result.erased_at == (2,)
    assert [stage.layer for stage in result.stages] == [1, 5]
    assert result.emergence == "single"


def test_shares_add_up_with_the_embedding():
    model = toys.make("gpt_neox")
    toys.plant(model, [(2, 7, 2500.0), (4, 7, 2500.0)], context=CONTEXT)
    result = located(model, [CONTEXT])
    up_to_peak = sum(stage.share for stage in result.shares[: result.peak_layer + 1])
    assert up_to_peak + result.embedding_share == pytest.approx(1.0, abs=1e-5)
    for stage in result.shares:
        assert stage.attn_share + stage.ffn_share == pytest.approx(stage.share, abs=1e-5)


def test_without_attention_there_is_no_attention_share():
    model = toys.make("qwen3_5")
    toys.plant(model, [(2, 7, 2500.0)], context=CONTEXT)
    result = located(model, [CONTEXT])
    kinds = model.config.layer_types
    assert [stage.attn_share is None for stage in result.shares] == [kind == "linear_attention" for kind in kinds]


def test_a_minority_is_not_an_me_layer():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT)
    with_x, without = TEXTS[0], [toys.text(20, x_at=None, seed=s) for s in (7, 8)]
    result = located(model, [with_x, *without])
    assert result.me_layer is None
    assert [row.n_holding for row in result.blocks[3:]] == [1] * 5
    assert {s.sequence for s in result.massive} == {0}
    assert result.sentence.startswith("There is no ME layer: the criterion holds in places")
    assert located(model, [with_x, TEXTS[1], without[0]]).me_layer == 3


def test_a_median_of_zero_has_no_ratio():
    # Everything but the planted dimensions is silent, so that the median over the sequence is 0.
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    with torch.no_grad():
        x = model.get_input_embeddings().weight[toys.X].clone()
        x[torch.arange(toys.D_MODEL) != toys.LISTEN] = 0
        model.get_input_embeddings().weight.zero_()
        model.get_input_embeddings().weight[toys.X] = x
        for block in toys.blocks(model):
            block.self_attn.o_proj.weight.zero_()
            for n in range(toys.D_MODEL):
                if n != 7:
                    block.mlp.down_proj.weight[n] = 0
    result = located(model, [CONTEXT])
    assert result.me_layer == 3
    assert result.blocks[3].median_abs == 0
    assert result.blocks[3].ratio is None
    assert "the median is 0; this one block creates it" in result.sentence


def test_the_criterion_is_an_argument():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT)
    assert located(model, criterion=Criterion(min_abs=4000)).me_layer is None
    assert located(model, criterion=Criterion(min_ratio=1e6)).me_layer is None
    assert located(model, criterion=Criterion(persistence=1.0)).me_layer is None
    assert located(model, criterion=Criterion(persistence=0.0)).me_layer == 3
    given = located(model, criterion=Criterion(min_abs=50)).to_dict()["settings"]["criterion"]
    assert given["min_abs"] == 50


# --- rows, batches, precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss", "qwen3_next", "qwen3_moe"])
def test_a_row_never_depends_on_its_neighbours(family):
    model = toys.plant(toys.make(family), [(3, 7, 3000.0)], context=CONTEXT)
    together = located(model)
    one_by_one = located(model, max_batch_tokens=1)
    for a, b in zip(together.blocks, one_by_one.blocks, strict=True):
        assert (a.sequence, a.token_index, a.dim, a.n_massive) == (b.sequence, b.token_index, b.dim, b.n_massive)
        assert a.max_abs == pytest.approx(b.max_abs, rel=1e-4)
        assert a.median_abs == pytest.approx(b.median_abs, rel=1e-4)
    for index, text in enumerate(TEXTS):
        alone = located(model, [text])
        assert [s.value for s in alone.massive] == pytest.approx(
            [s.value for s in together.massive if s.sequence == index], rel=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT).to(dtype)
    result = located(model, [CONTEXT])
    assert result.me_layer == 3
    assert result.blocks[3].max_abs == pytest.approx(3000.0, rel=0.03)
    assert result.model.dtype == str(dtype).removeprefix("torch.")


def test_an_overflow_in_float16_is_a_finding():
    model = toys.plant(toys.make("llama"), [(3, 7, 90_000.0)], context=CONTEXT)
    assert located(model, [CONTEXT]).blocks[3].max_abs == pytest.approx(90_000, rel=1e-3)
    result = located(model.half(), [CONTEXT])
    assert (result.non_finite.layer, result.non_finite.token_index, result.non_finite.dim) == (3, 4, 7)
    assert result.non_finite.value == "inf"
    assert result.blocks[3].max_abs is None
    assert result.blocks[2].max_abs is not None
    assert "Non-finite activations in float16: the first (inf) is in the output of block 3" in result.sentence


def test_nan_weights_are_a_finding():
    model = toys.make("llama")
    with torch.no_grad():
        toys.blocks(model)[2].mlp.down_proj.weight[0, 0] = float("nan")
    result = located(model)
    assert result.non_finite.layer == 2
    assert result.me_layer is None
    assert [row.max_abs is None for row in result.blocks] == [False] * 2 + [True] * 6


def test_nan_weights_behind_the_me_layer_are_a_finding_too():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT)
    with torch.no_grad():
        toys.blocks(model)[6].mlp.down_proj.weight[0, 0] = float("nan")
    result = located(model)
    assert result.me_layer == 3
    assert result.non_finite.layer == 6
    assert result.shares == ()


def test_the_model_is_bit_identical_afterwards():
    model = toys.plant(toys.make("qwen3_moe"), [(3, 7, 3000.0)], context=CONTEXT).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    located(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# --- few tokens ----------------------------------------------------------------------------------------------------


def test_one_token_is_too_few_and_says_so():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    result = located(model, ["X"])
    assert any("criterion is not meaningful here" in note for note in result.notes)
    assert result.blocks[3].others_norm is None


def test_short_texts_do_not_vote_beside_long_ones():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT)
    result = located(model, [CONTEXT, "w1 w2", "w3", "w5"])
    assert result.me_layer == 3
    assert [row.votes for row in result.sequences] == [True, False, False, False]
    assert any("Too short to vote on the ME layer (fewer than 8 tokens): 3 of 4 texts" in n for n in result.notes)


# --- the pieces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "kind"),
    [
        ([0.0, 0.95, 0.05], "single"),
        ([0.5, 0.0, 0.5], "staged"),
        ([0.4, 0.3, 0.25, 0.05], "staged"),
        ([0.3, 0.3, 0.2, 0.2], "gradual"),
        ([0.5, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05], "gradual"),
        ([0.09] * 11, "gradual"),
    ],
)
def test_classify(shares, kind):
    assert classify(shares) == kind


def test_progress_ends_at_the_total():
    steps = []
    located(toys.make("llama"), max_batch_tokens=32, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (62, 62)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len(steps) > 1


def test_to_dict_is_plain_and_stable():
    import json

    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)], context=CONTEXT)
    values = json.loads(json.dumps(located(model).to_dict(), allow_nan=False))
    assert set(values) >= {
        "melayer_version", "model", "settings", "me_layer", "emergence", "stages", "erased_at", "blocks", "massive",
    }  # fmt: skip
    assert set(values["model"]) == {"name", "fingerprint", "dtype", "family", "n_layers", "d_model"}
    assert set(values["stages"][0]) == {"layer", "share", "attn_share", "ffn_share"}
    assert set(values["blocks"][0]) >= {
        "layer", "max_abs", "sequence", "token_index", "token", "dim", "median_abs", "ratio", "n_massive",
    }  # fmt: skip
    assert set(values["massive"][0]) == {"layer", "sequence", "token_index", "token", "dim", "value"}


def test_the_fingerprint_is_of_the_weights_and_not_of_the_dtype():
    from melayer.model.provenance import fingerprint

    model = toys.make("llama")
    first = fingerprint(model)
    assert fingerprint(toys.make("llama")) == first
    assert fingerprint(toys.make("llama", dtype=torch.bfloat16)) == first
    assert fingerprint(toys.make("llama", seed=1)) != first


# --- the demo model: facts -----------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_demo_model_as_measured_before(demo):
    text = "My favorite color is Dark Blue. The sky is clear today."
    result = melayer.locate(demo.model, demo.tokenizer, texts=[text])
    assert result.me_layer == 11
    assert result.emergence == "single"
    assert result.erased_at == (28, 29)
    row = result.blocks[11]
    assert (row.token_index, row.dim) == (0, 507)
    assert row.max_abs == pytest.approx(23_738, rel=0.01)
    assert row.ratio == pytest.approx(12_746, rel=0.01)
    assert result.stages[0].share == pytest.approx(0.998, abs=0.002)
    for layer, value in {1: 193, 2: 714, 9: 124, 28: 9056, 29: 3444}.items():
        assert result.blocks[layer].max_abs == pytest.approx(value, rel=0.01)
    for layer in (1, 2):
        assert result.blocks[layer].n_massive == 0
    shares = {stage.layer: stage.share for stage in result.shares}
    assert shares[28] == pytest.approx(-0.60, abs=0.02)
    assert shares[29] == pytest.approx(-0.23, abs=0.02)


@pytest.mark.demo
def test_the_demo_model_on_the_builtin_texts(demo):
    result = melayer.locate(demo.model, demo.tokenizer)
    assert result.me_layer == 11
    assert all(row.massive_token_index == 0 for row in result.sequences)


@pytest.mark.demo
def test_an_end_of_text_token_put_first_is_reported_by_sequence(demo):
    # Whatever the first token is: the result says where the massive one is, and with BOS says that it was there.
    result = melayer.locate(demo.model, demo.tokenizer, bos=True)
    assert result.settings["bos"]["sequences_with_bos"] == len(result.sequences)
    assert {row.first_token for row in result.sequences} == {"<|im_start|>"}
    assert all((row.massive_token_index is not None) == bool(row.holds) for row in result.sequences)
