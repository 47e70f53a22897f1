"""The sequences that a quantisation check runs, each with its prefix."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from melayer.data.rows import Row, encode
from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.model.decoder import Decoder
from melayer.model.forward import embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _hash(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()


def _prefix(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase, given: Sequence[int] | None, bos: bool | None
) -> list[int]:
    if given is None:
        if bos and tokenizer.bos_token_id is None:
            raise InputError("This tokenizer has no begin-of-sequence token. Give a prefix, or leave the choice to it.")
        return [] if bos is False or tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    ids, size = [int(token) for token in given], embedding_weight(decoder.model).shape[0]
    for token in ids:
        if not 0 <= token < size:
            raise InputError(f"The prefix has id {token}, but the model has tokens 0 to {size - 1}.")
    if not ids:
        raise InputError("The prefix is empty. Give at least one token, or none at all for the tokenizer's own.")
    return ids


def _sequences(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | None,
    calibration: Sequence[str] | None,
    prefix: Sequence[int],
    T: int,
    n: int,
) -> tuple[list[Row], list[Row]]:
    """The sequences to calibrate with and those to predict, none of them in both."""
    if len(prefix) + 2 > T:
        raise InputError(
            f"The length T is {T}; expected at least {len(prefix) + 2}: the prefix ({len(prefix)}), a token and the "
            "next one to predict."
        )
    if decoder.max_positions is not None and decoder.max_positions < T:
        raise InputError(
            f"Sequences of T = {T} tokens were asked for, but the model has {decoder.max_positions} positions. Give a "
            f"T of at most {decoder.max_positions}."
        )
    if n < 1:
        raise InputError(f"n_sequences is {n}; expected at least 1.")
    if calibration is None:
        cut = _cut(tokenizer, builtin_texts() if texts is None else texts, prefix, T, 2 * n)
        if len(cut) < 2:
            raise InputError(
                f"The texts make one sequence of T = {T} tokens; expected at least two, one to calibrate with and one "
                "to predict. Give longer texts, a smaller T, or calibration texts."
            )
        held, predicted = cut[::2], cut[1::2]
    else:
        held = _cut(tokenizer, calibration, prefix, T, n)
        predicted = _cut(tokenizer, builtin_texts() if texts is None else texts, prefix, T, n)
    known_ids = {row.ids for row in held}
    for row in predicted:
        if row.ids in known_ids:
            raise InputError(
                f"A sequence to predict ({row.text[:30]!r}…) is among those to calibrate with, so its scales would be "
                "its own. Give calibration texts that are not among the texts."
            )
    return [[replace(row, index=place) for place, row in enumerate(rows)] for rows in (held, predicted)]  # type: ignore[return-value]


def _cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prefix: Sequence[int], T: int, n: int) -> list[Row]:
    found: list[Row] = []
    longest, step = 0, T - len(prefix)
    for row in encode(tokenizer, texts, max_tokens=sys.maxsize, bos=False):
        longest = max(longest, len(row))
        for start in range(0, len(row) - step + 1, step):
            found.append(replace(row, ids=(*prefix, *row.ids[start : start + step]), tokens=(), has_bos=False))
            if len(found) == n:
                return found
    if not found:
        raise InputError(
            f"No text has the {step} tokens that a sequence of T = {T} takes behind the prefix; the longest has "
            f"{longest}. Give longer texts, or a T of at most {longest + len(prefix)}."
        )
    return found
