"""A token's way through the blocks, held against what PyTorch's own hooks see in a pass of the whole text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stopped
import toys
from melayer.data.rows import encode
from melayer.measurements.locate.trajectory import Trajectory, growth_of, prefixes_of, trajectories
from melayer.model import wiring

CONTEXT = toys.text(20, x_at=4, seed=1)
AT = 4
LAYER, DIM, VALUE = 3, 7, 3000.0


def rows_of(*texts):
    return encode(toys.tokenizer(), list(texts))


def block_states(model, text):
    """[n_layers, seq, d_model] before and after every block in a pass of the whole text."""
    ids = toys.tokenizer()(text, return_tensors="pt")["input_ids"]
    before, after = [], []
    for block in toys.blocks(model):
        with toys.capture(block) as seen, torch.no_grad():
            model(ids, use_cache=False)
        before.append(seen["in"][0].float())
        after.append(seen["out"][0].float())
    return torch.stack(before).numpy(), torch.stack(after).numpy()


def of_one(model, text, token):
    (row,) = rows_of(text)
    ((sequences, trajectory),) = trajectories(wiring.read(model), {0: (row, token)}, max_batch_tokens=512)
    assert sequences == [0]
    return trajectory


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_it_is_what_the_blocks_read_and_return_in_the_whole_text(family):
    model = toys.plant(toys.make(family), [(LAYER, DIM, VALUE)], context=CONTEXT)
    trajectory = of_one(model, CONTEXT, AT)
    before, after = (states[:, AT] for states in block_states(model, CONTEXT))
    np.testing.assert_allclose(trajectory.block_in, before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trajectory.block_out, after, rtol=1e-4, atol=1e-3)
    assert trajectory.block_out[LAYER, DIM] == pytest.approx(VALUE, rel=1e-2)
    assert abs(trajectory.block_out[LAYER - 1, DIM]) < 1


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_what_the_branches_add_is_what_the_block_adds(family):
    model = toys.plant(toys.make(family), [(LAYER, DIM, VALUE)], context=CONTEXT)
    trajectory = of_one(model, CONTEXT, AT)
    softmax = [
        family not in toys.HYBRID or model.config.layer_types[layer] != "linear_attention"
        for layer in range(toys.N_LAYERS)
    ]
    # A site that a block does not have is NaN, never a number.
    assert np.isnan(trajectory.attn_out).all(axis=1).tolist() == [not there for there in softmax]
    added = trajectory.attn_out + trajectory.ffn_out
    np.testing.assert_allclose(
        added[softmax], (trajectory.block_out - trajectory.block_in)[softmax], rtol=1e-4, atol=2e-3
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite", "qwen3_moe"])
def test_who_wrote_the_peak(family):
    # Twice as much after block 5: two stages, then a block that takes from it.
    writes = [(2, DIM, 2000.0), (5, DIM, 2000.0), (6, DIM, -1000.0)]
    model = toys.plant(toys.make(family), writes, context=CONTEXT)
    growth = growth_of(of_one(model, CONTEXT, AT))
    assert growth.peak_layer == 5
    shares, attn, ffn = growth.shares.T
    assert shares[[2, 5]] == pytest.approx([0.5, 0.5], abs=0.02)
    assert shares[6] == pytest.approx(-0.25, abs=0.02)
    assert ffn[[2, 5, 6]] == pytest.approx(shares[[2, 5, 6]], abs=0.02)
    assert np.abs(attn).max() < 0.02
    assert np.abs(shares[[0, 1, 3, 4]]).max() < 0.02
    assert growth.embedding_share + shares[:6].sum() == pytest.approx(1.0, abs=1e-6)


def test_an_ordinary_token_grows_little_by_little():
    growth = growth_of(of_one(toys.make("llama"), toys.text(20, x_at=None), 3))
    assert np.abs(growth.shares[:, 0]).max() < 0.9  # no block writes it alone
    assert growth.embedding_share + growth.shares[: growth.peak_layer + 1, 0].sum() == pytest.approx(1.0, abs=1e-6)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_shares_up_to_the_peak_and_the_embeddings_are_one(n_layers, seed):
    generator = np.random.default_rng(seed)
    states = generator.standard_normal((n_layers + 1, 5)).astype(np.float32)
    attn = generator.standard_normal((n_layers, 5)).astype(np.float32)
    growth = growth_of(Trajectory(states[:-1], attn, states[1:] - states[:-1] - attn, states[1:]))
    assert growth.peak_layer == np.linalg.norm(states[1:].astype(np.float64), axis=1).argmax()
    assert growth.embedding_share + growth.shares[: growth.peak_layer + 1, 0].sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(growth.shares[:, 0], growth.shares[:, 1:].sum(axis=1), atol=1e-4)


def test_equal_beginnings_run_once_and_no_longer_than_they_must():
    model = toys.plant(toys.make("llama"), [(LAYER, DIM, VALUE)], context=CONTEXT)
    words = CONTEXT.split()
    rows = rows_of(CONTEXT, " ".join([*words[:5], "w1", "w2"]), " ".join(["w9", *words[1:]]))
    targets = {row.index: (row, AT) for row in rows}
    assert [(row.ids, sequences) for row, sequences in prefixes_of(targets)] == [
        (rows[0].ids[:5], [0, 1]),
        (rows[2].ids[:5], [2]),
    ]
    ran = []
    handle = toys.blocks(model)[0].register_forward_hook(lambda module, args, out: ran.append(out.shape[:2]))
    found = list(trajectories(wiring.read(model), targets, max_batch_tokens=512))
    handle.remove()
    assert ran[-1] == (2, 5)  # both in one pass, cut behind the token
    assert sorted(sequences for sequences, _ in found) == [[0, 1], [2]]


def test_batches_change_nothing():
    model = toys.plant(toys.make("llama"), [(LAYER, DIM, VALUE)], context=CONTEXT)
    decoder = wiring.read(model)
    rows = rows_of(CONTEXT, toys.text(30, x_at=9, seed=2), toys.text(12, x_at=2, seed=3))
    targets = {row.index: (row, row.ids.index(toys.X)) for row in rows}
    together, alone = (
        {sequences[0]: trajectory for sequences, trajectory in trajectories(decoder, targets, max_batch_tokens=size)}
        for size in (512, 1)
    )
    for index in targets:
        np.testing.assert_allclose(together[index].block_out, alone[index].block_out, rtol=1e-5, atol=1e-4)


def test_a_run_that_stops_early_gives_a_trajectory_that_ends_there():
    model = toys.plant(toys.make("llama"), [(LAYER, DIM, VALUE)], context=CONTEXT)
    (row,) = rows_of(CONTEXT)
    ((_, found),) = trajectories(
        wiring.read(model), {0: (row, AT)}, max_batch_tokens=512, run_batch=stopped.after(LAYER)
    )
    assert len(found.block_out) == LAYER + 1
    whole = of_one(model, CONTEXT, AT)
    np.testing.assert_array_equal(found.block_out, whole.block_out[: LAYER + 1])
