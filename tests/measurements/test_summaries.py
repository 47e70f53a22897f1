"""The first pass: what it keeps of every row at every block, against the activations themselves."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import stopped
import toys
from melayer.data.rows import batches, encode
from melayer.measurements.criterion import Criterion
from melayer.measurements.summaries import SequenceSummary, holding_of, summaries_of
from melayer.model import wiring

LAYER, DIM, VALUE = 3, 7, 3000.0
TEXTS = [toys.text(20, x_at=4, seed=1), toys.text(30, x_at=None, seed=2), toys.text(12, x_at=0, seed=3)]


def rows_of(texts=TEXTS):
    return encode(toys.tokenizer(), texts)


def planted(family="llama"):
    return toys.plant(toys.make(family), [(LAYER, DIM, VALUE)], context=TEXTS[0])


def measured(model, rows, *, size=512, k=4, **options) -> dict[int, SequenceSummary]:
    passes = list(batches(rows, max_batch_tokens=size))
    return summaries_of(wiring.read(model), passes, options.pop("criterion", Criterion()), k=k, **options)


def activations(model, row):
    """[1 + n_layers, seq, d_model] of one row alone: what enters block 0, and what each block returns."""
    ids = torch.tensor([row.ids])
    states = []
    for layer, block in enumerate(toys.blocks(model)):
        with toys.capture(block) as seen, torch.no_grad():
            model(ids, use_cache=False)
        states += [seen["in"][0]] * (layer == 0) + [seen["out"][0]]
    return torch.stack(states).float().numpy()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen3_next"])
def test_every_figure_is_that_of_the_row_alone(family):
    model, rows, criterion = planted(family), rows_of(), Criterion()
    found = measured(model, rows, criterion=criterion)
    assert sorted(found) == [0, 1, 2]
    for row in rows:
        summary, states = found[row.index], activations(model, row)
        assert summary.n_run == toys.N_LAYERS
        size = np.abs(states)
        flat = np.sort(size.reshape(len(states), -1), axis=1)
        np.testing.assert_allclose(np.abs(summary.values), flat[:, :-5:-1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(summary.median_abs, flat[:, (flat.shape[1] - 1) // 2], rtol=1e-4, atol=1e-6)
        places = np.arange(len(states))[:, None]
        np.testing.assert_allclose(states[places, summary.tokens, summary.dims], summary.values, rtol=1e-4, atol=1e-4)
        bound = np.maximum(criterion.min_abs, criterion.min_ratio * summary.median_abs)
        assert summary.n_massive.tolist() == (size > bound[:, None, None]).sum(axis=(1, 2)).tolist()
        assert not summary.n_non_finite.any()


def test_a_planted_activation_holds_from_its_block_on_where_it_is_and_nowhere_else():
    rows = rows_of()
    found = measured(planted(), rows)
    holding = holding_of(rows, found)
    expected = np.zeros((3, toys.N_LAYERS), dtype=bool)
    expected[[0, 2], LAYER:] = True  # the text without X holds nothing
    assert (holding == expected).all()
    assert not holding_of(rows, measured(toys.make("llama"), rows)).any()


def test_what_is_not_finite_does_not_hold():
    rows, model = rows_of(), planted()
    with torch.no_grad():
        toys.blocks(model)[LAYER + 1].mlp.down_proj.weight[20] = float("inf")
    found = measured(model, rows)
    assert (found[0].n_non_finite[: LAYER + 2] == 0).all()
    assert (found[0].n_non_finite[LAYER + 2 :] > 0).all()
    assert holding_of(rows, found)[0].tolist() == [layer == LAYER for layer in range(toys.N_LAYERS)]


def test_batches_and_their_order_change_nothing():
    model, rows = planted(), rows_of()
    together, alone = measured(model, rows), measured(model, rows, size=1)
    backwards = measured(model, rows[::-1])
    for index, summary in together.items():
        for other in (alone[index], backwards[index]):
            np.testing.assert_allclose(summary.values, other.values, rtol=1e-5, atol=1e-5)
            assert (summary.n_massive == other.n_massive).all()
            assert (summary.tokens[LAYER + 1 :, 0] == other.tokens[LAYER + 1 :, 0]).all()


def test_others_listen_in_during_each_pass_and_hear_of_each_summary():
    model, rows = planted(), rows_of()
    events = []

    @contextmanager
    def during_batch(batch):
        events.append(("begin", [row.index for row in batch.rows]))
        yield
        events.append(("end", None))

    def on_summary(place, summary):
        events.append((place, summary.n_massive.tolist()))

    steps = []
    found = measured(
        model,
        rows,
        size=30,
        during_batch=during_batch,
        on_summary=on_summary,
        progress=lambda done, total: steps.append((done, total)),
    )
    per_pass = 2 + 1 + toys.N_LAYERS
    assert [name for name, _ in events] == ["begin", *range(1 + toys.N_LAYERS), "end"] * (len(events) // per_pass)
    assert [about for name, about in events if name == "begin"] == [[1], [0], [2]]  # the longest first
    assert [counts[0] for name, counts in events if name == LAYER + 1] == [
        found[index].n_massive[LAYER + 1] for index in (1, 0, 2)
    ]
    assert steps == [(30, 62), (50, 62), (62, 62)]


def test_where_the_run_stops_the_summaries_do():
    model, rows = planted(), rows_of()
    found, whole = measured(model, rows, run_batch=stopped.after(LAYER)), measured(model, rows)
    assert {summary.n_run for summary in found.values()} == {LAYER + 1}
    for index, summary in found.items():
        np.testing.assert_array_equal(summary.values, whole[index].values[: LAYER + 2])
