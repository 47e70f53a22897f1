"""The sequences of a check: how texts are cut, what comes first in each, and that none is seen twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from melayer.data.rows import Row
from melayer.errors import InputError
from melayer.model.subject import Subject
from melayer.quantisation.sequences import check_sequences, cut, prefix_of, sha256_of

TEXTS = [toys.text(40, x_at=None, seed=seed) for seed in range(4)]
OTHERS = [toys.text(40, x_at=None, seed=seed) for seed in range(20, 24)]


@pytest.fixture(scope="module")
def subject():
    return Subject.of(toys.make("llama"), toys.tokenizer())


def ids_of(text):
    return toys.tokenizer()(text, add_special_tokens=False)["input_ids"]


def sequences(subject, prefix=(toys.X,), texts=TEXTS, calibration=OTHERS, T=16, n=5):
    return check_sequences(subject, prefix, texts, calibration, T=T, n=n)


# --- the prefix ----------------------------------------------------------------------------------------------------


def test_the_prefix_is_what_was_given_or_what_the_tokenizer_puts_in_front(subject):
    bos = toys.tokenizer().bos_token_id
    assert prefix_of(subject, [4, 5], None) == prefix_of(subject, [4, 5], False) == (4, 5)
    assert prefix_of(subject, None, None) == ()  # this tokenizer has BOS, but does not put it in front
    assert prefix_of(subject, None, True) == (bos,)
    adding = Subject(subject.decoder, toys.beginning_tokenizer(), subject.info)
    assert prefix_of(adding, None, None) == prefix_of(adding, None, True) == (bos,)
    assert prefix_of(subject, None, False) == prefix_of(adding, None, False) == ()


def test_a_text_that_begins_with_the_prefix_does_not_get_it_twice():
    words = toys.text(11, x_at=None)
    for tokenizer in (toys.tokenizer(), toys.beginning_tokenizer()):
        plain, brought, twice = (
            cut(tokenizer, [f"{begins}{words}"], (1,), 6, 9) for begins in ("", "<s> ", "<s> <s> ")
        )
        assert [row.ids for row in plain] == [row.ids for row in brought]
        assert [row.own_bos for row in brought] == [1, 0]
        assert twice[0].ids[:2] == (1, 1)  # what the text has beside it stays


def test_a_tokenizer_without_such_a_token_gives_none_and_is_not_asked_for_one(subject):
    tokenizer = toys.tokenizer()
    tokenizer.bos_token = None
    without = Subject(subject.decoder, tokenizer, subject.info)
    assert prefix_of(without, None, None) == ()
    with pytest.raises(InputError, match="This tokenizer has no begin-of-sequence token. Give a prefix, or leave"):
        prefix_of(without, None, True)
    assert prefix_of(without, [4], True) == (4,)


@pytest.mark.parametrize("token", [-1, toys.VOCAB])
def test_the_prefix_is_of_the_models_tokens(subject, token):
    assert prefix_of(subject, [0, toys.VOCAB - 1], None) == (0, toys.VOCAB - 1)
    with pytest.raises(InputError, match=rf"The prefix has id {token}, but the model has tokens 0 to {toys.VOCAB - 1}"):
        prefix_of(subject, [0, token], None)
    with pytest.raises(InputError, match="The prefix is empty. Give at least one token"):
        prefix_of(subject, [], None)


# --- cutting -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    prefix=st.lists(st.integers(2, 9), max_size=3),
    behind=st.integers(1, 12),
    n=st.integers(1, 20),
)
def test_each_is_the_prefix_and_the_next_tokens_of_a_text(lengths, prefix, behind, n):
    texts = [toys.text(length, x_at=None, seed=seed) for seed, length in enumerate(lengths)]
    T = len(prefix) + behind
    expected = []
    for text in texts:
        ids = ids_of(text)
        expected += [(*prefix, *ids[at * behind : (at + 1) * behind]) for at in range(len(ids) // behind)]
    if not expected:
        with pytest.raises(InputError, match=rf"the longest has {max(lengths)}. Give longer texts, or a T of at most"):
            cut(toys.tokenizer(), texts, prefix, T, n)
        return
    rows = cut(toys.tokenizer(), texts, prefix, T, n)
    assert [row.ids for row in rows] == expected[:n]
    assert [row.index for row in rows] == list(range(len(rows)))


def test_what_the_longest_text_allows_can_be_cut():
    with pytest.raises(InputError, match=r"No text has the 48 tokens .* of T = 50 .* or a T of at most 42"):
        cut(toys.tokenizer(), TEXTS, [3, 4], 50, 1)
    (row,) = cut(toys.tokenizer(), TEXTS[:1], [3, 4], 42, 5)
    assert row.ids == (3, 4, *ids_of(TEXTS[0]))


# --- calibration and evaluation ------------------------------------------------------------------------------------


def test_texts_of_their_own_calibrate(subject):
    found = sequences(subject)
    assert found.calibration_rows == cut(toys.tokenizer(), OTHERS, [toys.X], 16, 5)
    assert found.evaluation_rows == cut(toys.tokenizer(), TEXTS, [toys.X], 16, 5)
    assert (found.n_prefix, found.n_predicted) == (1, 14)
    assert (found.calibration_tokens, found.evaluation_tokens) == (5 * 16, 5 * 16)


@pytest.mark.parametrize(("n", "sizes"), [(2, (2, 2)), (4, (4, 4)), (100, (4, 4))])
def test_without_them_every_other_sequence_of_the_texts_does(subject, n, sizes):
    found = sequences(subject, calibration=None, n=n)
    every = [row.ids for row in cut(toys.tokenizer(), TEXTS, [toys.X], 16, 2 * n)]
    assert (len(found.calibration_rows), len(found.evaluation_rows)) == sizes
    assert [row.ids for row in found.calibration_rows] == every[::2]
    assert [row.ids for row in found.evaluation_rows] == every[1::2]
    for rows in (found.calibration_rows, found.evaluation_rows):
        assert [row.index for row in rows] == list(range(len(rows)))


def test_one_sequence_is_too_few_for_both(subject):
    with pytest.raises(InputError, match="make one sequence of T = 30 tokens; expected at least two"):
        sequences(subject, texts=TEXTS[:1], calibration=None, T=30)
    assert len(sequences(subject, texts=TEXTS[:1], T=30).evaluation_rows) == 1


def test_what_is_predicted_never_calibrates(subject):
    with pytest.raises(InputError, match=r"A sequence to predict \('.{30}'…\) is among those to calibrate with"):
        sequences(subject, calibration=[*OTHERS[:1], TEXTS[0]])
    # The same words twice are in both halves, too.
    with pytest.raises(InputError, match="is among those to calibrate with"):
        sequences(subject, texts=[toys.text(15, x_at=None, seed=1)] * 2, calibration=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"T": 2}, r"The length T is 2; expected at least 3: the prefix \(1\), a token and the next one to predict"),
        ({"T": 4, "prefix": (4, 5, 6)}, r"The length T is 4; expected at least 5: the prefix \(3\)"),
        ({"T": 257}, r"T = 257 tokens were asked for, but the model has 256 positions. Give a T of at most 256"),
        ({"n": 0}, "n_sequences is 0; expected at least 1"),
    ],
)
def test_lengths_and_numbers_out_of_range(subject, options, said):
    with pytest.raises(InputError, match=said):
        sequences(subject, **options)


def test_the_hash_is_of_the_ids_alone():
    def rows(*ids, text=""):
        return [Row(at, text, of, (), 0, False) for at, of in enumerate(ids)]

    first = sha256_of(rows((1, 2), (3, 4)))
    assert first == sha256_of(rows((1, 2), (3, 4), text="other"))
    others = [rows((3, 4), (1, 2)), rows((1, 2, 3, 4)), rows((1, 2), (3,), (4,)), rows((1, 2), (34,)), []]
    assert len({first, *map(sha256_of, others)}) == 1 + len(others)
