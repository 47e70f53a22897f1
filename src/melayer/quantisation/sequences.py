"""The sequences that a quantisation check runs, each with its prefix."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from melayer.data.rows import Row, encode
from melayer.data.texts import builtin_texts
from melayer.data.tokens import Affixes
from melayer.errors import InputError
from melayer.model.forward import embedding_weight
from melayer.model.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class CheckSequences:
    """Sequences of one length that begin with the same prefix; none is both to calibrate with and to predict."""

    prefix: tuple[int, ...]
    T: int
    calibration_rows: tuple[Row, ...]
    evaluation_rows: tuple[Row, ...]

    @property
    def n_prefix(self) -> int:
        """Tokens of the prefix."""
        return len(self.prefix)

    @property
    def n_predicted(self) -> int:
        """Tokens of each sequence that are predicted: from the second behind the prefix on."""
        return self.T - self.n_prefix - 1

    @property
    def calibration_tokens(self) -> int:
        """Of all sequences to calibrate with, as progress counts them."""
        return self.T * len(self.calibration_rows)

    @property
    def evaluation_tokens(self) -> int:
        """Of all sequences to predict, as progress counts them."""
        return self.T * len(self.evaluation_rows)


def prefix_of(subject: Subject, ids: Sequence[int] | None, bos: bool | None) -> tuple[int, ...]:
    """The ids that every sequence begins with.

    Args:
        subject: The model and its tokenizer.
        ids: The ids that were given; None for what the tokenizer puts in front.
        bos: Where none are given, whether the begin-of-sequence token comes first; None leaves it to the tokenizer.

    Raises:
        InputError: An id is not the model's, none is given, or the tokenizer has no begin-of-sequence token.
    """
    bos_id = subject.tokenizer.bos_token_id
    if ids is None:
        if bos and bos_id is None:
            raise InputError("This tokenizer has no begin-of-sequence token. Give a prefix, or leave the choice to it.")
        if bos is None:
            return Affixes.of(subject.tokenizer).front
        return (int(bos_id),) if bos and bos_id is not None else ()
    size = embedding_weight(subject.model).shape[0]
    prefix = tuple(int(token) for token in ids)
    for token in prefix:
        if not 0 <= token < size:
            raise InputError(f"The prefix has id {token}, but the model has tokens 0 to {size - 1}.")
    if not prefix:
        raise InputError("The prefix is empty. Give at least one token, or none at all for the tokenizer's own.")
    return prefix


def check_sequences(
    subject: Subject,
    prefix: tuple[int, ...],
    texts: Sequence[str] | None,
    calibration: Sequence[str] | None,
    *,
    T: int,
    n: int,
) -> CheckSequences:
    """The sequences to calibrate with and those to predict.

    Args:
        subject: The model and its tokenizer.
        prefix: The ids that each begins with.
        texts: What to predict; None for the built-in ones.
        calibration: What to calibrate with; None for every other sequence of `texts`, which then is not predicted.
        T: Tokens in each, the prefix counted.
        n: Sequences of either kind, at most.

    Raises:
        InputError: T or n is out of range, the texts are too short, or a sequence would be in both.
    """
    _check_length(subject, len(prefix), T, n)
    tokenizer, texts = subject.tokenizer, builtin_texts() if texts is None else texts
    if calibration is None:
        both = cut(tokenizer, texts, prefix, T, 2 * n)
        if len(both) < 2:
            raise InputError(
                f"The texts make one sequence of T = {T} tokens; expected at least two, one to calibrate with and one "
                "to predict. Give longer texts, a smaller T, or calibration texts."
            )
        calibration_rows, evaluation_rows = _numbered(both[::2]), _numbered(both[1::2])
    else:
        calibration_rows = cut(tokenizer, calibration, prefix, T, n)
        evaluation_rows = cut(tokenizer, texts, prefix, T, n)
    calibrating = {row.ids for row in calibration_rows}
    for row in evaluation_rows:
        if row.ids in calibrating:
            raise InputError(
                f"A sequence to predict ({row.text[:30]!r}…) is among those to calibrate with, so its scales would be "
                "its own. Give calibration texts that are not among the texts."
            )
    return CheckSequences(prefix, T, calibration_rows, evaluation_rows)


def cut(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prefix: Sequence[int], T: int, n: int
) -> tuple[Row, ...]:
    """The first `n` sequences of exactly T tokens: the prefix, then the texts one after the other, what is left
    over of each dropped. A text that begins with the prefix itself, as one from a chat template does, does not get
    it twice.

    Raises:
        InputError: No text is long enough.
    """
    rows: list[Row] = []
    longest, step = 0, T - len(prefix)
    for row in encode(tokenizer, texts, max_tokens=sys.maxsize, bos=False):
        begins = len(prefix) if prefix and row.ids[: len(prefix)] == tuple(prefix) else 0
        longest = max(longest, len(row) - begins)
        for start in range(begins, len(row) - step + 1, step):
            ids = (*prefix, *row.ids[start : start + step])
            rows.append(
                replace(
                    row, index=len(rows), ids=ids, tokens=(), has_bos=False, own_bos=row.own_bos * (start == begins)
                )
            )
            if len(rows) == n:
                return tuple(rows)
    if not rows:
        raise InputError(
            f"No text has the {step} tokens that a sequence of T = {T} takes behind the prefix; the longest has "
            f"{longest}. Give longer texts, or a T of at most {longest + len(prefix)}."
        )
    return tuple(rows)


def sha256_of(rows: Sequence[Row]) -> str:
    """What tells these sequences from others."""
    return hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()


def _check_length(subject: Subject, n_prefix: int, T: int, n: int) -> None:
    most = subject.decoder.max_positions
    if n_prefix + 2 > T:
        raise InputError(
            f"The length T is {T}; expected at least {n_prefix + 2}: the prefix ({n_prefix}), a token and the "
            "next one to predict."
        )
    if most is not None and most < T:
        raise InputError(
            f"Sequences of T = {T} tokens were asked for, but the model has {most} positions. Give a "
            f"T of at most {most}."
        )
    if n < 1:
        raise InputError(f"n_sequences is {n}; expected at least 1.")


def _numbered(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(replace(row, index=index) for index, row in enumerate(rows))
