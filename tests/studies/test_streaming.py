"""Pieces of an answer: never a part of a character, and together the whole text."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from melayer.studies.answers.streaming import TextPieces


class Bytes:
    """A tokenizer with a token for each byte, and 256 for one that is skipped."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


def pieces_of(ids, prompt=(1, 2, 3)):
    pieces = []
    streamer = TextPieces(Bytes(), 5, "masked", lambda *given: pieces.append(given))
    streamer.put(torch.tensor([list(prompt)]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert {given[:2] for given in pieces} <= {(5, "masked")}
    return [text for _, _, text in pieces]


@given(st.text(max_size=12))
def test_each_character_comes_when_it_is_whole(text):
    text = text.replace("\ufffd", "?")
    pieces = pieces_of(text.encode("utf-8"))
    assert pieces == list(text)


def test_a_token_without_text_is_no_piece():
    assert pieces_of([256, *b"a", 256, *b"b", 256]) == ["a", "b"]
    assert pieces_of([]) == pieces_of([256]) == []


def test_the_prompt_is_no_part_of_the_answer():
    assert pieces_of(b"a", prompt=b"question") == ["a"]


def test_a_character_that_is_never_finished_is_shown_at_the_end():
    assert pieces_of("é".encode()[:1]) == ["\ufffd"]
    assert pieces_of(b"a" + "é".encode()[:1]) == ["a", "\ufffd"]
