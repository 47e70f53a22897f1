"""Exactly one beginning, and long texts in pieces that change no token."""

import base64
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from melayer.data import tokens
from melayer.data.rows import bos_note, encode, windows
from melayer.data.texts import builtin_texts
from melayer.data.tokens import Affixes, Ids
from melayer.errors import InputError

BOS, EOS = 1, 2


def ids(tokenizer, text, bos=None):
    return list(Ids.of(tokenizer, bos).of_text(text).ids)


@pytest.mark.parametrize("own", [0, 1, 3])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("adds", [False, True])
def test_bos_is_never_doubled_and_what_a_text_brings_stays(own, bos, adds):
    tokenizer = toys.beginning_tokenizer() if adds else toys.tokenizer()
    text = "<s> " * own + "w4 w5"
    found = Ids.of(tokenizer, bos).of_text(text)
    added = 0 if own else int(bos or (bos is None and adds))
    assert list(found.ids) == [BOS] * (own + added) + [7, 8]
    assert found.own_bos == own
    assert list(Ids.of(tokenizer, bos).of_texts([text, "w4"])[0].ids) == list(found.ids)


def test_what_ends_every_text_is_there_once():
    tokenizer = toys.beginning_tokenizer(ends=True)
    assert Affixes.of(tokenizer) == Affixes((BOS,), (EOS,))
    assert ids(tokenizer, "w4") == ids(tokenizer, "<s> w4 </s>") == [BOS, 7, EOS]
    assert ids(tokenizer, "w4 </s> </s>") == [BOS, 7, EOS, EOS]
    assert ids(tokenizer, "w4", bos=True) == [BOS, 7]


def test_the_way_of_the_tokenizer_is_its_own():
    for tokenizer in (toys.tokenizer(), toys.beginning_tokenizer(), toys.beginning_tokenizer(ends=True)):
        for text in ("w4", "w4 w5 X"):
            assert ids(tokenizer, text) == tokenizer(text)["input_ids"]


def test_a_front_of_several_tokens_is_there_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = toys.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert ids(tokenizer, "w4") == ids(tokenizer, "</s> <s> w4") == [EOS, BOS, 7]
    assert ids(tokenizer, "<s> w4") == [EOS, BOS, BOS, 7]  # that is not the front, but something else


def test_where_bos_is_eos_or_none():
    tokenizer = toys.beginning_tokenizer()
    tokenizer.eos_token = "<s>"
    assert ids(tokenizer, "<s> w4 <s>") == [BOS, 7, BOS]
    tokenizer = toys.tokenizer()
    tokenizer.bos_token = None
    found = Ids.of(tokenizer, None).of_text("<s> w4")
    assert (list(found.ids), found.own_bos) == ([BOS, 7], 0)
    with pytest.raises(InputError, match="this tokenizer has none"):
        Ids.of(tokenizer, True)


def test_rows_say_what_texts_bring():
    tokenizer = toys.beginning_tokenizer()
    rows = encode(tokenizer, ["<s> w4 w5", "w4 w5", "<s> <s> w4"])
    assert [row.ids for row in rows] == [(BOS, 7, 8), (BOS, 7, 8), (BOS, BOS, 7)]
    assert [(row.has_bos, row.own_bos) for row in rows] == [(True, 1), (True, 0), (True, 2)]
    assert bos_note(rows) == (
        "2 of 3 sequences begin with a begin-of-sequence token (<s>) that their text brings, up to 2 of them, as a "
        "chat template writes it: it stays as it is, and none is added."
    )
    assert bos_note(rows[1:2]) == ""


def test_windows_of_a_text_begin_once():
    plain, brought = (
        windows(toys.beginning_tokenizer(), [f"{own}{toys.text(20, x_at=None)}"], 6) for own in ("", "<s> ")
    )
    assert [row.ids for row in plain] == [row.ids for row in brought]
    assert all(row.ids.count(BOS) == 1 for row in plain)
    assert len(plain) == 4


def test_a_text_that_cannot_be_tokenised_is_named():
    with pytest.raises(
        InputError, match=r"Text 1 \('w1 \\\\ud800'\) cannot be tokenised: it holds U\+D800 at character 3"
    ):
        encode(toys.tokenizer(), ["w4", "w1 \ud800"])


# --- pieces ----------------------------------------------------------------------------------------------------------


def in_pieces(tokenizer, text):
    """The ids by pieces, and whether all cuts were sure."""
    found = Ids.of(tokenizer, False).of_text(text)
    return list(found.ids), found.exact


def kinds():
    """Tokenizers that cut words apart, and such that see a text as a whole, trained on melayer's own texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]

    def made(model, trainer, before):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = before
        tokenizer.train_from_iterator([line for text in builtin_texts() for line in text.split("\n")], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")

    bpe = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    unigram = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    spaced = pre_tokenizers.Metaspace(prepend_scheme="always")
    return {
        "byte level": made(models.BPE(), bpe, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "byte level with a space": made(models.BPE(), bpe, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "pieces of sentences": made(models.Unigram(), unigram, spaced),
        "whole texts": made(models.BPE(unk_token="<unk>"), bpe, pre_tokenizers.Metaspace(split=False)),
        "words": toys.tokenizer(),
    }


TOKENIZERS = kinds()
LONG = "\n\n".join(builtin_texts())
DRAWN = random.Random(0)
ODD = {
    "prose": LONG,
    "no spaces": base64.b64encode(DRAWN.randbytes(6000)).decode(),
    "one letter": "a" * 9000,
    "blanks": " " * 4000 + "x",
    "Chinese": "清晨的阳光洒在街道上，人们走出家门。" * 300,
    "anything": "".join(chr(DRAWN.choice([32, 10, 65, 97, 0x4E00, 0x1F600, 0x301, 46, 48])) for _ in range(6000)),
    "specials": "<s> w1 </s> " * 600,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ODD)
def test_pieces_change_no_token_or_say_that_they_may(kind, name, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 700)
    tokenizer = TOKENIZERS[kind]
    found, exact = in_pieces(tokenizer, ODD[name])
    whole = tokenizer(ODD[name], add_special_tokens=False)["input_ids"]
    if exact:
        assert found == whole
    if name == "prose" and kind != "whole texts":
        assert exact
    if not exact:  # nothing of it is lost all the same
        assert abs(len(found) - len(whole)) <= 4 * (len(ODD[name]) // 700)


@given(
    st.lists(st.sampled_from(["w1", "w22", "X", "<s>", "\n", " ", "é", "清", "."]), max_size=400), st.integers(40, 90)
)
def test_pieces_of_any_text(parts, size):
    text = "".join(parts)
    tokenizer = TOKENIZERS["byte level"]
    before, tokens.PIECE = tokens.PIECE, size
    try:
        found, exact = in_pieces(tokenizer, text)
    finally:
        tokens.PIECE = before
    assert not exact or found == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_is_not_needed_is_not_tokenised(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 700)
    tokenizer, seen = TOKENIZERS["byte level"], []
    call = tokens._call

    def counting(tokenizer, text, **options):
        seen.append(len(text))
        return call(tokenizer, text, **options)

    monkeypatch.setattr(tokens, "_call", counting)
    found = Ids.of(tokenizer, None).of_text("w1 w22 " * 10_000, at_most=50)
    assert not found.whole
    assert len(found.ids) > 50
    assert list(found.ids[:50]) == tokenizer("w1 w22 " * 100)["input_ids"][:50]
    assert max(seen) <= 1000
    assert sum(seen) < 10_000
    # Where all of it is needed, no more than a piece is tokenised at once either: that is what bounds the memory.
    seen.clear()
    assert Ids.of(tokenizer, None).of_text("w1 w22 " * 3_000).whole
    assert max(seen) <= 1000


@pytest.mark.demo
def test_pieces_of_the_demo_tokenizer(demo, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 700)
    for name in ("prose", "no spaces", "Chinese", "anything"):
        assert in_pieces(demo.tokenizer, ODD[name]) == (demo.tokenizer(ODD[name])["input_ids"], True)
