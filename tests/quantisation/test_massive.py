"""Where massive tokens emerge and which they are, against `locate` and against the stored states."""

import pytest
import torch

import melayer
import toys
from masked import ME, model_of
from melayer.data.rows import Row
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion
from melayer.model import wiring
from melayer.quantisation.massive import elsewhere, emergence, massive_tokens, with_prefix

LENGTH = 20


def texts_of(places):
    return [toys.text(LENGTH, x_at=at, seed=seed) for seed, at in enumerate(places)]


def rows_of(texts):
    ids = [tuple(toys.tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [Row(index, text, row, (), 0, False) for index, (text, row) in enumerate(zip(texts, ids, strict=True))]


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def decoder(model):
    return wiring.read(model)


@pytest.mark.parametrize("max_batch_tokens", [1, 50, 2048])
def test_it_is_what_locate_finds(model, decoder, max_batch_tokens):
    texts = texts_of([0, 7, None, 3])
    located = melayer.locate(model, toys.tokenizer(), texts=texts, bos=False)
    found = emergence(decoder, rows_of(texts), Criterion(), max_batch_tokens=max_batch_tokens)
    assert found.me_layer == located.me_layer == ME
    assert found.above == pytest.approx(located.massive_above, rel=1e-5)
    assert found.flags.nonzero().tolist() == [[0, 0], [1, 7], [3, 3]]


def test_the_same_threshold_tells_massive_tokens_elsewhere(model, decoder):
    found = emergence(decoder, rows_of(texts_of([0, 0])), Criterion(), max_batch_tokens=2048)
    others = rows_of(texts_of([None, 5, 19]))
    states = []
    handle = toys.blocks(model)[ME].register_forward_hook(
        lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(torch.tensor([row.ids for row in others]), use_cache=False)
    handle.remove()
    flags = massive_tokens(decoder, others, ME, found.above, max_batch_tokens=LENGTH)
    assert torch.equal(flags, states[0].abs().amax(-1) > found.above)
    assert flags.nonzero().tolist() == [[1, 5], [2, 19]]


def test_without_an_me_layer_no_token_is_massive():
    decoder = wiring.read(toys.make("llama"))
    rows = rows_of(texts_of([0, 0]))
    found = emergence(decoder, rows, Criterion(), max_batch_tokens=2048)
    assert (found.me_layer, found.above) == (None, 0.0)
    for flags in (found.flags, massive_tokens(decoder, rows, None, 0.0, max_batch_tokens=2048)):
        assert flags.shape == (2, LENGTH)
        assert not flags.any()


def test_the_criterion_decides(decoder):
    rows = rows_of(texts_of([0, 0, None, None]))
    assert emergence(decoder, rows, Criterion(), max_batch_tokens=2048).me_layer is None  # half are no majority
    assert emergence(decoder, rows, Criterion(majority=0.4), max_batch_tokens=2048).me_layer == ME
    assert emergence(decoder, rows, Criterion(majority=0.4, min_abs=1e6), max_batch_tokens=2048).me_layer is None


def test_what_is_not_finite_is_refused():
    model = toys.make("llama")
    with torch.no_grad():
        toys.ffn(toys.blocks(model)[2]).down_proj.weight.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite from the output of block 2 on, so they have no scale"):
        emergence(wiring.read(model), rows_of(texts_of([0])), Criterion(), max_batch_tokens=2048)


def test_progress_counts_tokens(decoder):
    calls = []
    emergence(
        decoder,
        rows_of(texts_of([0, 0])),
        Criterion(),
        max_batch_tokens=LENGTH,
        progress=lambda *given: calls.append(given),
    )
    assert calls == [(LENGTH, 2 * LENGTH), (2 * LENGTH, 2 * LENGTH)]


def test_what_stands_apart_and_what_is_elsewhere():
    flags = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert with_prefix(flags, 2).tolist() == [[True, True, True, False], [True, True, False, False]]
    assert flags.sum() == 2  # what was given is not written into
    assert torch.equal(with_prefix(flags, 0), flags)
    assert [(of.n, of.n_tokens) for of in (elsewhere(flags, 0), elsewhere(flags, 1), elsewhere(flags, 3))] == [
        (2, 8),
        (1, 6),
        (0, 2),
    ]
