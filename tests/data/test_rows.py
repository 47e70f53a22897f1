import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from melayer.data.rows import Row, batches, encode, token_text, visible
from melayer.data.texts import builtin_texts, read_texts
from melayer.errors import InputError


def row(index: int, length: int) -> Row:
    ids = tuple((7 * index + place) % 50 + 1 for place in range(length))
    return Row(index, "", ids, tuple(map(str, ids)), 0, False)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 100))
@settings(deadline=None)
def test_batches_hold_every_row_once_and_pad_on_the_right(lengths, limit):
    rows = [row(index, length) for index, length in enumerate(lengths)]
    seen = []
    for batch in batches(rows, max_batch_tokens=limit):
        assert batch.ids.shape == batch.attention_mask.shape == (len(batch.rows), max(batch.lengths))
        assert len(batch.rows) == 1 or batch.ids.numel() <= limit
        for place, one in enumerate(batch.rows):
            assert batch.ids[place, : len(one)].tolist() == list(one.ids)
            assert batch.attention_mask[place].tolist() == [1] * len(one) + [0] * (batch.ids.shape[1] - len(one))
        seen += [one.index for one in batch.rows]
    assert sorted(seen) == list(range(len(rows)))


def test_the_builtin_texts_are_varied():
    texts = builtin_texts()
    assert len(texts) >= 7
    assert any(len(text.split()) == 1 and text.isascii() for text in texts)  # a single word
    assert any("一" <= character <= "鿿" for text in texts for character in text)  # Chinese
    assert any("def " in text for text in texts)
    assert any("|---|" in text for text in texts)


def test_bos_is_the_tokenizers_choice_unless_asked(tokenizer):
    assert encode(tokenizer, ["w4 w5"])[0].ids == (7, 8)
    asked = encode(tokenizer, ["w4 w5"], bos=True)[0]
    assert asked.ids == (1, 7, 8)
    assert asked.has_bos


def test_bos_is_left_out_on_request():
    tokenizer = toys.tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert encode(tokenizer, ["w4 w5"])[0].ids == (1, 7, 8)
    assert encode(tokenizer, ["w4 w5"], bos=False)[0].ids == (7, 8)
    assert encode(tokenizer, ["w4 w5"], bos=True)[0].ids == (1, 7, 8)


def test_long_texts_are_cut_and_counted(tokenizer):
    cut = encode(tokenizer, ["w4 " * 30], max_tokens=12)[0]
    assert len(cut) == 12
    assert cut.n_dropped == 18


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "There are no texts to measure. Give at least one"),
        (["w4", "  \n"], {}, "Text 1 is empty. Give texts with at least one word"),
        ("w4", {}, r"given as one string; expected a list of strings. Write \[text\]"),
        (["w4"], {"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        (
            ["w4"],
            {"max_tokens": 300, "max_positions": 256},
            r"300 tokens were asked for, but the model has 256 positions. Give --max-tokens 256",
        ),
    ],
)
def test_bad_input_is_said(tokenizer, texts, options, message):
    with pytest.raises(InputError, match=message):
        encode(tokenizer, texts, **options)


def test_the_advice_on_positions_works(tokenizer):
    assert len(encode(tokenizer, ["w4 " * 300], max_tokens=256, max_positions=256)[0]) == 256
    assert len(encode(tokenizer, ["w4 " * 300], max_positions=256)[0]) == 256


def test_bos_of_a_tokenizer_without_one():
    tokenizer = toys.tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="this tokenizer has none"):
        encode(tokenizer, ["w4"], bos=True)


def test_files(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    assert read_texts(file) == ["one", "two"]
    assert read_texts(file, whole=True) == ["one\n\ntwo\n"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(
        InputError, match=r"is no text in UTF-8: 1 of the first 1 lines .* convert it to UTF-8 first: iconv"
    ):
        read_texts(file)
    file.write_text(" \n")
    with pytest.raises(InputError, match="is empty. Give one with text"):
        read_texts(file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_texts(tmp_path / "none.txt")


def test_tokens_are_shown_as_text(tokenizer):
    assert token_text(tokenizer, 7) == "w4"
    assert visible(" a\n") == "␣a⏎"
    assert visible("\t") == "⇥"


@pytest.mark.demo
def test_parts_of_characters_are_shown_as_bytes(demo):
    ids = demo.tokenizer("清")["input_ids"]
    assert "".join(token_text(demo.tokenizer, i) for i in ids) == "\\xe6\\xb8\\x85"
