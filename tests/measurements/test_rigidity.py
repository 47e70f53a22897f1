import io
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rich.console import Console

import melayer
import toys
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion
from melayer.measurements.rigidity.cosines import mean_pairwise_cosine
from melayer.measurements.rigidity.effective_rank import spectral_entropy
from melayer.measurements.rigidity.report import section
from melayer.measurements.rigidity.rigidity import rigidity
from melayer.measurements.rigidity.table import show_rigidity

CONTEXT = toys.text(20, x_at=4, seed=1)
TEXTS = [CONTEXT, toys.text(30, x_at=0, seed=2), toys.text(12, x_at=7, seed=3)]
PLACES = (4, 0, 7)


def measured(model, texts=TEXTS, **options):
    return rigidity(model, toys.tokenizer(), texts=texts, **{"n_first_tokens": 8, **options})


def planted(family="llama", **options):
    return toys.plant(toys.make(family, **options), [(3, 7, 3000.0)], context=CONTEXT)


def block_outputs(model, ids):
    """[n_layers, tokens, d_model] by hooks of our own: the last hidden state of transformers is after the norm."""
    states = []
    handles = [
        block.register_forward_hook(
            lambda module, args, output: states.append((output if torch.is_tensor(output) else output[0])[0].double())
        )
        for block in toys.blocks(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(states).numpy()


def attention_inputs(model, ids):
    """{layer: [tokens, d_model]} for the blocks with softmax attention."""
    found = {}
    handles = []
    for layer, block in enumerate(toys.blocks(model)):
        if hasattr(block, "linear_attn"):
            continue

        def hook(module, args, kwargs, layer=layer):
            found[layer] = (args[0] if args else kwargs["hidden_states"])[0].double().numpy()

        handles.append(toys.mixer(block).register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def rank_by_svd(matrix):
    p = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def ids_of(text):
    return toys.tokenizer()(text)["input_ids"]


# --- across blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "qwen3_5"])
def test_cosines_across_blocks_are_those_of_the_hidden_states(family):
    model = planted(family)
    result = measured(model)
    assert result.me_layer == 3
    assert result.n_sequences == 3
    to_next, to_peak = [], []
    for text, place in zip(TEXTS, PLACES, strict=True):
        states = block_outputs(model, ids_of(text))[:, place]
        peak = states[np.linalg.norm(states, axis=1).argmax()]
        to_next.append([cosine(a, b) for a, b in pairwise(states)])
        to_peak.append([cosine(state, peak) for state in states])
    assert len(result.cosine_next) == toys.N_LAYERS - 1
    np.testing.assert_allclose(result.cosine_next, np.mean(to_next, axis=0), atol=1e-5)
    np.testing.assert_allclose(result.cosine_peak, np.mean(to_peak, axis=0), atol=1e-5)


def test_a_planted_activation_is_rigid_from_the_me_layer_on():
    result = measured(planted())
    assert min(result.cosine_next[3:]) > 0.999
    assert result.cosine_next[2] < 0.1
    assert result.rigid_until == 7
    assert result.sentence.startswith("From block 3 (the ME layer) to block 7 the massive token's cosine between neigh")
    assert "is at least 0.9999; " in result.sentence  # rounded down


def test_rigidity_ends_where_it_is_erased():
    model = toys.plant(toys.make("llama"), [(2, 7, 3000.0), (6, 7, -2900.0)], context=CONTEXT)
    result = measured(model, [CONTEXT])
    assert (result.me_layer, result.erased_at, result.rigid_until) == (2, (6,), 5)


# --- across inputs -------------------------------------------------------------------------------------------------


@given(
    arrays.arrays(
        np.float64,
        st.tuples(st.integers(2, 9), st.integers(1, 6)),
        elements=st.floats(-10, 10).filter(lambda value: value == 0 or abs(value) > 1e-3),
    ).filter(lambda rows: (np.linalg.norm(rows, axis=1) > 0).all())
)
def test_the_mean_over_pairs_needs_no_pairs(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
    assert mean_pairwise_cosine(unit.sum(axis=0), len(unit)) == pytest.approx(np.mean(pairs), abs=1e-9)


def test_over_one_vector_there_is_no_pair():
    assert np.isnan(mean_pairwise_cosine(np.ones((3, 4)), 1)).all()


def test_cosines_across_inputs_are_those_of_single_tokens():
    model = planted()
    words = range(4, toys.VOCAB)  # w0 is the unknown token, and so special
    n_words = len(words)
    result = measured(model, n_first_tokens=n_words, max_batch_tokens=7)
    assert result.n_first_tokens == n_words
    states = np.stack([block_outputs(model, [token])[:, 0] for token in words], axis=1)
    for layer in range(toys.N_LAYERS):
        pairs = [cosine(a, b) for i, a in enumerate(states[layer]) for b in states[layer][:i]]
        assert result.cosine_inputs[layer] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert result.n_massive_first_tokens == 1  # X alone
    assert set(result.cosine_inputs_massive) == {None}
    assert f"over {n_words} first tokens (1 become massive)" in result.sentence


def test_every_first_token_massive_is_rigid_over_inputs():
    model = planted()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, toys.LISTEN] = 20.0
    result = measured(model)
    assert result.n_massive_first_tokens == 8
    assert result.cosine_inputs == result.cosine_inputs_massive
    assert min(result.cosine_inputs[3:]) > 0.999


def test_the_draw_is_seeded_and_never_special():
    model = planted()
    assert measured(model, seed=5).to_dict() == measured(model, seed=5).to_dict()
    assert measured(model, seed=5).cosine_inputs != measured(model, seed=6).cosine_inputs


def test_bos_is_left_out_before_the_drawn_tokens():
    model = planted()
    with_bos, without = measured(model, bos=True), measured(model)
    assert with_bos.cosine_inputs == without.cosine_inputs
    assert max(with_bos.cosine_inputs) < 0.999
    assert any("start with BOS (<s>), which would be 1 by causality" in note for note in with_bos.notes)
    assert with_bos.settings["first_tokens"] == "drawn, each alone at position 0, without BOS"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_5"])
def test_a_fixed_first_token_is_one_by_causality(family):
    result = measured(planted(family), fixed_first_token=True)
    assert result.cosine_inputs == pytest.approx([1.0] * toys.N_LAYERS, abs=1e-6)
    assert (result.n_first_tokens, result.n_massive_first_tokens) == (1, None)
    assert result.settings["fixed_first_token"] == "<s>"
    assert "its cosine is 1 by causality" in result.sentence
    assert any("is 1 by causality, whatever the model" in note for note in result.notes)


def test_a_fixed_first_token_without_bos_is_that_of_the_first_text():
    tokenizer = toys.tokenizer()
    tokenizer.bos_token = None
    result = rigidity(planted(), tokenizer, texts=TEXTS, fixed_first_token=True)
    assert result.settings["fixed_first_token"] == CONTEXT.split()[0]
    assert result.cosine_inputs == pytest.approx([1.0] * toys.N_LAYERS, abs=1e-6)


# --- effective rank ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "olmo2", "gpt_oss", "qwen3_5"])
def test_effective_ranks_are_those_of_the_singular_values(family):
    model = planted(family)
    # 100 tokens are more than d_model, so that both sides of the Gram matrix are taken; the short ones are padded.
    texts = [*TEXTS, toys.text(100, x_at=2, seed=4)]
    places = [*PLACES, 2]
    result = measured(model, texts)
    assert result.n_rank_sequences == 4
    assert result.tokens == 25
    truth = {}
    for text, place in zip(texts, places, strict=True):
        ids = ids_of(text)
        matrices = {("block_out", layer): matrix for layer, matrix in enumerate(block_outputs(model, ids))}
        matrices |= {("attn_in", layer): matrix for layer, matrix in attention_inputs(model, ids).items()}
        for key, matrix in matrices.items():
            pair = rank_by_svd(matrix), rank_by_svd(np.delete(matrix, place, axis=0))
            truth.setdefault(key, []).append(pair)
    assert {(row.site, row.layer) for row in result.effective_rank} == set(truth)
    for row in result.effective_rank:
        found = (row.with_massive, row.without_massive)
        assert found == pytest.approx(np.mean(truth[row.site, row.layer], axis=0), rel=1e-4)
        logs = np.log(truth[row.site, row.layer]).mean(axis=0)
        assert (row.entropy_with, row.entropy_without) == pytest.approx(logs, rel=1e-4, abs=1e-6)


def test_the_massive_token_collapses_the_rank_of_the_residual_stream():
    with_massive, without = measured(planted()).mean_rank("block_out")
    assert with_massive < 1.01
    assert without > 1.5


def test_linear_attention_has_no_attention_input():
    model = planted("qwen3_5")
    kinds = model.config.layer_types
    layers = [row.layer for row in measured(model).effective_rank if row.site == "attn_in"]
    assert layers == [layer for layer, kind in enumerate(kinds) if kind != "linear_attention"]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_entropy_of_either_shape(n_tokens, d_model, seed):
    matrix = torch.randn(n_tokens, d_model, generator=torch.Generator().manual_seed(seed))
    rank = spectral_entropy(matrix).exp().item()
    assert rank == pytest.approx(rank_by_svd(matrix.double().numpy()), rel=1e-6)
    assert 1 - 1e-9 <= rank <= min(n_tokens, d_model) + 1e-9


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_entropy_of_nothing_finite_is_nan(value):
    assert spectral_entropy(torch.full((3, 4), value)).isnan()


def test_a_row_never_depends_on_its_neighbours():
    model = planted("gemma3")
    together, one_by_one = measured(model), measured(model, max_batch_tokens=1)
    for a, b in zip(together.effective_rank, one_by_one.effective_rank, strict=True):
        assert (a.layer, a.site) == (b.layer, b.site)
        assert (a.with_massive, a.without_massive) == pytest.approx((b.with_massive, b.without_massive), rel=1e-4)
    assert together.cosine_next == pytest.approx(one_by_one.cosine_next, abs=1e-5)
    assert together.cosine_inputs == pytest.approx(one_by_one.cosine_inputs, abs=1e-5)


def test_ranks_with_and_without_are_of_the_same_texts():
    result = measured(planted(), [*TEXTS, toys.text(40, x_at=None, seed=5)])
    assert result.n_sequences == result.n_rank_sequences == 3
    assert any("Effective ranks are over the 3 texts that have a massive token" in note for note in result.notes)


# --- little to measure ---------------------------------------------------------------------------------------------


def test_nothing_massive_follows_the_first_token_and_says_so():
    model = toys.make("llama")
    result = measured(model)
    assert result.me_layer is None
    assert any("no massive token to follow: the figures are of token 0 of each text" in note for note in result.notes)
    truth = []
    for text in TEXTS:
        states = block_outputs(model, ids_of(text))[:, 0]
        truth.append([cosine(a, b) for a, b in pairwise(states)])
    np.testing.assert_allclose(result.cosine_next, np.mean(truth, axis=0), atol=1e-5)
    assert {row.without_massive for row in result.effective_rank} == {None}
    assert result.n_massive_first_tokens is None
    assert result.sentence.startswith("There is no ME layer, so token 0 of each text was followed")


def test_a_text_of_one_token_has_no_rank():
    result = measured(planted(), [*TEXTS, "w1"])
    assert result.n_rank_sequences == 3
    assert any("Too short for an effective rank" in note and "1 of 4 texts" in note for note in result.notes)


def test_short_texts_alone_have_no_ranks_at_all():
    result = measured(planted(), ["X", "w1 w2"])
    assert result.effective_rank == ()
    assert result.tokens is None
    assert any("Too short for an effective rank" in note and "2 of 2 texts" in note for note in result.notes)
    section(result)
    show_rigidity(result, Console(file=io.StringIO()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    exact, half = measured(planted()), measured(planted().to(dtype))
    assert half.me_layer == 3
    assert half.cosine_next == pytest.approx(exact.cosine_next, abs=0.01)
    for a, b in zip(exact.effective_rank, half.effective_rank, strict=True):
        assert (b.with_massive, b.without_massive) == pytest.approx((a.with_massive, a.without_massive), rel=0.02)


def test_what_is_not_finite_is_none_and_said():
    model = toys.make("llama")
    with torch.no_grad():
        toys.blocks(model)[6].mlp.down_proj.weight[0, 0] = float("nan")
    result = measured(model)
    json.dumps(result.to_dict(), allow_nan=False)
    assert result.cosine_next[5] is None
    assert result.cosine_next[3] is not None
    ranks = {(row.layer, row.site): row.with_massive for row in result.effective_rank}
    assert ranks[6, "block_out"] is None
    assert ranks[6, "attn_in"] is not None
    assert any("Non-finite activations in float32" in note for note in result.notes)
    section(result)
    show_rigidity(result, Console(file=io.StringIO()))


# --- what is given -------------------------------------------------------------------------------------------------


def test_a_located_result_is_used():
    model = planted()
    located = melayer.locate(model, toys.tokenizer(), texts=TEXTS, bos=True, max_tokens=15, name="toy")
    given = measured(model, located=located)
    assert given.to_dict() == measured(model, bos=True, max_tokens=15, name="toy").to_dict()
    assert given.settings["bos"]["sequences_with_bos"] == 3


def test_a_located_result_of_something_else_is_refused():
    model = planted()
    located = melayer.locate(model, toys.tokenizer(), texts=TEXTS)
    with pytest.raises(InputError, match=r"of other texts \(3 texts, 62 tokens\) than those given \(1 texts, 20 tok"):
        measured(model, [CONTEXT], located=located)
    with pytest.raises(InputError, match="The located result is of another model"):
        measured(toys.make("llama", seed=3), located=located)
    with pytest.raises(InputError, match="has another criterion than the one given"):
        measured(model, located=located, criterion=Criterion(min_abs=50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"n_first_tokens": 1},
            "n_first_tokens is 1; expected at least 2. With a fixed first token the cosine over inputs is 1 by "
            r"causality: it sees only itself. Give at least 2, or ask for that case with fixed_first_token=True",
        ),
        ({"n_first_tokens": 61}, "n_first_tokens is 61, but only 60 tokens .* are not special. Give at most 60"),
        ({"texts": ["w1 w2"], "fixed_first_token": True}, "there is only one. Give at least 2"),
        ({"texts": []}, "There are no texts to measure"),
    ],
)
def test_bad_input_is_said(options, message):
    with pytest.raises(InputError, match=message):
        measured(toys.make("llama"), **options)


def test_the_advice_works():
    assert measured(planted(), n_first_tokens=60).n_first_tokens == 60


def test_progress_ends_at_the_total():
    steps = []
    measured(planted(), max_batch_tokens=32, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (124, 124)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_the_model_is_as_it_was():
    model = planted("qwen3_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_to_dict_is_plain_and_stable():
    values = json.loads(json.dumps(measured(planted("qwen3_5")).to_dict(), allow_nan=False))
    assert set(values) >= {
        "melayer_version", "model", "settings", "me_layer", "sentence", "notes", "cosine_next", "cosine_peak",
        "cosine_inputs", "n_first_tokens", "effective_rank",
    }  # fmt: skip
    assert set(values["effective_rank"][0]) >= {"layer", "site", "with_massive", "without_massive"}
    assert set(values["model"]) == {"name", "fingerprint", "dtype", "family", "n_layers", "d_model"}


# --- shown ---------------------------------------------------------------------------------------------------------


def test_the_report_section():
    result = measured(planted())
    made = section(result)
    assert made.answer == result.sentence
    assert [part.key for part in made.parts] == ["rigidity-cosine", "rigidity-rank"]
    for part in made.parts:
        assert part.takeaway
        assert part.reading
        json.dumps(part.figure, allow_nan=False)
    names = [trace["name"] for trace in made.parts[0].figure["data"]]
    assert names == ["to the next block", "to the peak state", "over first tokens"]
    assert made.parts[0].figure["layout"]["annotations"][0]["text"] == "ME layer 3"
    section(measured(toys.make("llama")))


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_every_block(width):
    result = measured(planted(), name="toy [bold]")
    file = io.StringIO()
    show_rigidity(result, Console(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == [str(layer) for layer in range(toys.N_LAYERS)]
    assert rows[3][1:4] == [
        f"{values[3]:.4f}" for values in (result.cosine_next, result.cosine_peak, result.cosine_inputs)
    ]
    assert "ME layer" in lines[[line.split()[:1] for line in lines].index(["3"])]
    assert "toy [bold]" in " ".join(file.getvalue().split())


# --- the demo model: facts -----------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_demo_model_as_measured_before(demo):
    text = "My favorite color is Dark Blue. The sky is clear today."
    result = rigidity(demo.model, demo.tokenizer, texts=[text])
    assert result.me_layer == 11
    assert result.rigid_until == 27
    assert min(result.cosine_next[12:27]) >= 0.999
    # Over first tokens it is 0.785 before the ME layer; from there on, every one of them has the same state.
    assert result.n_massive_first_tokens == 64
    assert result.cosine_inputs[10] == pytest.approx(0.785, abs=0.03)
    assert min(result.cosine_inputs[11:28]) > 0.9995
