"""A census of parts, merged in any order, is the census of the whole; and its figures are right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melayer.census.counts import Census, Window, merged
from melayer.census.observe import Observation, Place
from melayer.errors import InputError
from melayer.numerics import histogram

PLACES = (Place("embedding", None), Place("block_out", 0), Place("block_out", 1))
WIDTH, VOCABULARY, MIN_TOKENS = 3, 7, 4


def documents(seed: int, count: int):
    """[document] of [window] of ids, and activations {place: [tokens, d]} with ties, zeros and spikes."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(count):
        windows = []
        for number in range(draw.integers(1, 4)):
            ids = tuple(draw.integers(0, VOCABULARY, draw.integers(1, 9)).tolist())
            values = [draw.choice([-8.0, 0.0, 1.5, 3.0, 7e4], (len(ids), WIDTH), p=[0.1, 0.2, 0.4, 0.25, 0.05])
                      + draw.integers(0, 2) * draw.normal(size=(len(ids), WIDTH)) for _ in PLACES]  # fmt: skip
            windows.append((Window(index, number, ids), [value.astype(np.float32) for value in values]))
        found.append(windows)
    return found


def observation(windows) -> Observation:
    """What `observe` keeps, computed in the plainest way."""
    longest = max(len(window.ids) for window, _ in windows)
    maxima, tokens, dims, massive = [], [], [], np.zeros((2, len(windows), longest), bool)
    for place in range(len(PLACES)):
        at = [np.unravel_index(np.abs(values[place]).argmax(), values[place].shape) for _, values in windows]
        maxima.append([values[place][where] for (_, values), where in zip(windows, at, strict=True)])
        tokens.append([token for token, _ in at])
        dims.append([dim for _, dim in at])
    for row, (window, values) in enumerate(windows):
        for layer in range(2):
            massive[layer, row, : len(window.ids)] = np.abs(values[layer + 1]).max(axis=1) > 1e4
    flats = [np.concatenate([values[place] for _, values in windows]) for place in range(len(PLACES))]
    return Observation(
        places=PLACES,
        counts=np.stack([np.bincount(histogram.bins_of(f).ravel(), minlength=histogram.BINS) for f in flats]),
        sums=np.array([[(f.astype(float) ** power).sum() for power in range(1, 5)] for f in flats]),
        n_summed=np.array([f.size for f in flats]),
        maxima=np.array(maxima, np.float32),
        tokens=np.array(tokens),
        dims=np.array(dims),
        dim_maxima=tuple(np.abs(f).max(axis=0) for f in flats),
        massive=massive,
    )


def census(some, order=None, per_batch: int = 3) -> Census:
    """Of whole documents, their windows batched in the order given."""
    found = Census.empty(PLACES, [WIDTH] * len(PLACES), 2, VOCABULARY, (1, 1, 1, 5))
    windows = [window for document in some for window in document]
    order = range(len(windows)) if order is None else order
    shuffled = [windows[place] for place in order]
    for start in range(0, len(shuffled), per_batch):
        part = shuffled[start : start + per_batch]
        found.add(observation(part), [window for window, _ in part], MIN_TOKENS)
        found.errors += len(part)
        found.energies += 2 * len(part)
    if some:
        maxima = [[max(np.abs(values[p]).max() for _, values in document) for document in some] for p in range(3)]
        found.add_documents(np.array(maxima, np.float32))
    return found


def same(left: Census, right: Census) -> None:
    assert left.places == right.places
    for name in ("counts", "n_summed", "maxima", "found_at", "holding", "n_massive", "seen", "massive_seen", "totals"):
        assert (getattr(left, name) == getattr(right, name)).all(), name
    for mine, other in zip(left.dim_maxima, right.dim_maxima, strict=True):
        assert (mine == other).all()
    assert (left.document_bins == right.document_bins).all()
    assert (left.document_counts == right.document_counts).all()
    np.testing.assert_allclose(left.sums, right.sums, rtol=1e-12, atol=1e-3)
    np.testing.assert_allclose(left.errors, right.errors)
    np.testing.assert_allclose(left.energies, right.energies)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.data())
def test_any_batches_shares_and_orders_of_merging_give_the_same(seed, count, data):
    found = documents(seed, count)
    whole = census(found)
    n_windows = sum(map(len, found))
    order = data.draw(st.permutations(range(n_windows)))
    same(whole, census(found, order, data.draw(st.integers(1, 8))))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    shares = [census([d for d, owner in zip(found, owners, strict=True) if owner == rank]) for rank in range(4)]
    shuffled = data.draw(st.permutations(range(4)))
    same(whole, merged([shares[rank] for rank in shuffled]))
    pairs = merged([merged(shares[:2]), merged(shares[2:])])
    same(whole, pairs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5))
def test_kept_and_read_again_it_is_the_same(seed, count):
    found = census(documents(seed, count))
    same(found, Census.from_bytes(found.to_bytes()))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_figures_are_those_of_a_straightforward_computation(seed, count):
    found = documents(seed, count)
    made = census(found)
    for place in range(len(PLACES)):
        flat = np.concatenate([values[place] for document in found for _, values in document]).astype(np.float64)
        mean, variance, kurtosis = made.moments(place)
        assert mean == pytest.approx(flat.mean(), rel=1e-5, abs=1e-9)
        assert variance == pytest.approx(flat.var(), rel=1e-5)
        if flat.var():
            central = flat - flat.mean()
            assert kurtosis == pytest.approx((central**4).mean() / flat.var() ** 2, rel=1e-5)
        size = np.sort(np.abs(flat).ravel())
        for share in (0.1, 0.5, 0.99, 1.0):
            exact = size[max(int(np.ceil(share * size.size)) - 1, 0)]
            assert histogram.quantile(made.counts[place], share) == pytest.approx(exact, rel=0.01, abs=2**-24)
        document, window, token, dim, token_id = made.found_at[place]
        ids, values = found[document][window][0].ids, found[document][window][1]
        assert values[place][token, dim] == made.maxima[place]
        assert ids[token] == token_id
        assert abs(made.maxima[place]) == np.abs(flat).max()
    sequences = [(window.ids, values) for document in found for window, values in document]
    voting = [values for ids, values in sequences if len(ids) >= MIN_TOKENS]
    assert made.totals.tolist() == [count, len(sequences), len(voting), sum(len(ids) for ids, _ in sequences)]
    for layer in range(2):
        assert made.holding[layer] == sum((np.abs(values[layer + 1]) > 1e4).any() for values in voting)
        assert made.n_massive[layer] == sum(
            int((np.abs(values[layer + 1]) > 1e4).any(axis=1).sum()) for _, values in sequences
        )
    for token in range(VOCABULARY):
        assert made.seen[token, 0] == sum(ids[0] == token for ids, _ in sequences)
        assert made.seen[token, 1] == sum(ids[1:].count(token) for ids, _ in sequences)


def of_maxima(values) -> Census:
    made = Census.empty(PLACES[:1], [1], 0, 1)
    made.add_documents(np.array([values], np.float32))
    made.maxima[0], made.found_at[0] = max(values), 0
    return made


def test_the_interval_is_that_of_a_drawn_bootstrap():
    draw = np.random.default_rng(0)
    values = np.exp(draw.normal(size=40) * 2).astype(np.float32)
    low, high = of_maxima(values).interval(0)
    drawn = [draw.choice(values, len(values)).max() for _ in range(20_000)]
    expected = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    assert low == pytest.approx(expected[0], rel=0.01)
    assert high == pytest.approx(expected[1], rel=0.01) == pytest.approx(values.max())


def test_the_growth_of_the_maximum_is_that_of_drawn_subsets():
    draw = np.random.default_rng(1)
    values = np.exp(draw.normal(size=50)).astype(np.float32)
    curve = dict(of_maxima(values).growth(0))
    assert curve[50] == pytest.approx(values.max())
    assert curve[1] == pytest.approx(values.mean(), rel=0.01)
    for size in (5, 17):
        nearest = min(curve, key=lambda count: abs(count - size))
        drawn = np.mean([draw.choice(values, nearest, replace=False).max() for _ in range(20_000)])
        assert curve[nearest] == pytest.approx(drawn, rel=0.02)


def test_of_nothing_there_are_no_figures():
    empty = census([])
    assert empty.interval(0) is None
    assert empty.growth(0) == []
    assert empty.moments(0) == (None, None, None)
    constant = Census.empty(PLACES[:1], [1], 0, 1)
    constant.sums[0], constant.n_summed[0] = [2, 2, 2, 2], 2
    assert constant.moments(0) == (1.0, 0.0, None)


def test_a_nan_is_the_largest_of_all():
    made = of_maxima([1.0, np.nan])
    assert made.document_maxima(0)[0][-1] == histogram.BINS - 1
    one, other = (Census.empty(PLACES[:1], [1], 0, 1) for _ in range(2))
    one.maxima[0], one.found_at[0] = np.nan, [4, 0, 0, 0, 0]
    other.maxima[0], other.found_at[0] = 9.0, [1, 0, 0, 0, 0]
    for pair in ([one, other], [other, one]):
        assert np.isnan(merged(pair).maxima[0])


def test_censuses_of_other_places_do_not_merge():
    other = Census.empty(PLACES[:1], [WIDTH], 2, VOCABULARY, (1, 1, 1, 5))
    with pytest.raises(InputError, match="different sites or models"):
        merged([census([]), other])
