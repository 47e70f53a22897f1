"""Texts to token rows, and rows to padded batches."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from melayer.data.documents import require_characters
from melayer.data.files import printable
from melayer.data.tokens import Ids
from melayer.errors import InputError, border

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Row:
    """One sequence as the model gets it."""

    index: int
    """Its place among the texts given, from 0."""
    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """What each id stands for, as text."""
    n_dropped: int
    """How many tokens of the text lie beyond `max_tokens`."""
    has_bos: bool
    own_bos: int = 0
    """Begin-of-sequence tokens that the text itself begins with, as one from a chat template does."""

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of similar length, padded on the right."""

    rows: tuple[Row, ...]
    ids: torch.Tensor
    """[batch, seq]"""
    attention_mask: torch.Tensor
    """[batch, seq], 1 for a token and 0 for padding."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each row."""
        return tuple(len(row) for row in self.rows)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    max_positions: int | None = None,
    bos: bool | None = None,
) -> tuple[Row, ...]:
    """The token rows of `texts`.

    Args:
        tokenizer: The model's.
        texts: One row each; none may be empty.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        max_positions: How many tokens the model was made for.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.

    Raises:
        InputError: No text, an empty one, more tokens than positions, or a BOS asked of a tokenizer without one.
    """
    if isinstance(texts, str):
        raise InputError("The texts were given as one string; expected a list of strings. Write [text].")
    if not texts:
        raise InputError("There are no texts to measure. Give at least one.")
    max_tokens = kept_tokens(max_tokens, max_positions)
    of = Ids.of(tokenizer, bos)
    rows = []
    for index, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"Text {index} is empty. Give texts with at least one word.")
        with border(f"Text {index} ({printable(text[:30])!r}) cannot be tokenised", "Mend it, or leave it out."):
            require_characters(text, "it")
            found = of.of_text(text)
        if not found.ids:
            raise InputError(
                f"Text {index} ({printable(text[:30])!r}) gives no tokens. Give texts with at least one word."
            )
        kept = tuple(found.ids[:max_tokens])
        rows.append(
            Row(
                index=index,
                text=text,
                ids=kept,
                tokens=tuple(token_text(tokenizer, token) for token in kept),
                n_dropped=len(found.ids) - len(kept),
                has_bos=tokenizer.bos_token_id is not None and kept[0] == tokenizer.bos_token_id,
                own_bos=found.own_bos,
            )
        )
    return tuple(rows)


def bos_note(rows: Sequence[Row]) -> str:
    """What is said where texts bring their own begin-of-sequence token; empty where none does."""
    bringing = [row for row in rows if row.own_bos]
    if not bringing:
        return ""
    most = max(row.own_bos for row in bringing)
    several = f", up to {most} of them" if most > 1 else ""
    token = f" ({visible(bringing[0].tokens[0])})" if bringing[0].tokens else ""
    return (
        f"{len(bringing)} of {len(rows)} sequences begin with a begin-of-sequence token{token} that their text brings"
        f"{several}, as a chat template writes it: it stays as it is, and none is added."
    )


def kept_tokens(max_tokens: int | None, max_positions: int | None, *, at_least: int = 1) -> int:
    """How many tokens a sequence may have: what was asked for, or 512, or the model's positions if they are fewer.

    Raises:
        InputError: Fewer than `at_least` were asked for, or more than the model has positions.
    """
    if max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, max_positions or DEFAULT_MAX_TOKENS)
    if max_tokens < at_least:
        raise InputError(f"max_tokens is {max_tokens}; expected at least {at_least}.")
    if max_positions is not None and max_tokens > max_positions:
        raise InputError(
            f"{max_tokens} tokens were asked for, but the model has {max_positions} positions. "
            f"Give --max-tokens {max_positions} (max_tokens={max_positions}) or fewer."
        )
    return max_tokens


def windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int,
    *,
    max_positions: int | None = None,
    bos: bool | None = None,
) -> tuple[Row, ...]:
    """The texts cut into sequences of exactly `length` tokens, one after the other; what is left over is dropped.

    Each window is a sequence of its own: where the text starts with BOS, so does every window.

    Raises:
        InputError: `length` is below 2 or beyond the model's positions, or no text has that many tokens.
    """
    if length < 2:
        raise InputError(f"The length T is {length}; expected at least 2, a key and a later query.")
    if max_positions is not None and length > max_positions:
        raise InputError(
            f"Sequences of T = {length} tokens were asked for, but the model has {max_positions} positions. "
            f"Give a T of at most {max_positions}."
        )
    found: list[Row] = []
    longest = 0
    for row in encode(tokenizer, texts, max_tokens=sys.maxsize, bos=bos):
        longest = max(longest, len(row))
        head = 1 if row.has_bos else 0
        step = length - head
        for start in range(head, len(row) - step + 1, step):
            found.append(
                Row(
                    index=len(found),
                    text=row.text,
                    ids=row.ids[:head] + row.ids[start : start + step],
                    tokens=row.tokens[:head] + row.tokens[start : start + step],
                    n_dropped=0,
                    has_bos=row.has_bos,
                    own_bos=row.own_bos if start == head else 0,
                )
            )
    if not found:
        raise InputError(
            f"No text has T = {length} tokens; the longest has {longest}. "
            f"Give longer texts, or a T of at most {longest}."
        )
    return tuple(found)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What a token stands for: its text, or its bytes where it is only a part of a character."""
    text = str(tokenizer.decode([token]))
    if text and "\ufffd" not in text:
        return text
    entry = cast("str | None", tokenizer.convert_ids_to_tokens(token))  # None for an id without an entry
    if entry is None:
        return f"<{token}>"
    byte_of = _bytes_of_characters()
    if all(character in byte_of for character in entry):
        return "".join(f"\\x{byte_of[character]:02x}" for character in entry)
    return str(entry)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as a character of its own (GPT-2)."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def batches(rows: Sequence[Row], *, max_batch_tokens: int = 2048) -> Iterator[Batch]:
    """The rows in batches of at most `max_batch_tokens` places, longest first so that memory peaks at the start.

    Rows of similar length go together; a row longer than the limit is a batch of its own.
    """
    ordered = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(ordered):
        width = len(ordered[start])
        taken = tuple(ordered[start : start + max(1, max_batch_tokens // width)])
        start += len(taken)
        # Any id does for padding: it comes after the tokens, so that a causal model never shows it to them.
        ids = torch.zeros(len(taken), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(taken):
            ids[place, : len(row)] = torch.tensor(row.ids)
            mask[place, : len(row)] = 1
        yield Batch(taken, ids, mask)


def visible(token: str) -> str:
    """A token's text with its white space made visible, for tables and plots."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    if shown.startswith(" "):
        shown = "␣" + shown[1:]
    if shown.endswith(" "):
        shown = shown[:-1] + "␣"
    return shown
