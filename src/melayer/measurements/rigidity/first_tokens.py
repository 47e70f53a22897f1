"""The different first tokens over which a massive state is compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from melayer.data.rows import Row, token_text
from melayer.errors import InputError
from melayer.measurements.locate.trajectory import bare_row
from melayer.model.forward import embedding_weight
from melayer.model.subject import Subject

# Rows of a fixed first token: later tokens cannot reach it, a few are enough to show that.
_FIXED_TOKENS = 16


def drawn_tokens(subject: Subject, n: int, seed: int) -> list[Row]:
    """Rows of one token each, all different, none special.

    Raises:
        InputError: There are not as many, or fewer than two were asked for.
    """
    if n < 2:
        raise InputError(
            f"n_first_tokens is {n}; expected at least 2. With a fixed first token the cosine over inputs is 1 by "
            "causality: it sees only itself. Give at least 2, or ask for that case with fixed_first_token=True."
        )
    tokenizer = subject.tokenizer
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    embedded = embedding_weight(subject.model).shape[0]
    usable = sorted({token for token in tokenizer.get_vocab().values() if token < embedded} - left_out)
    if n > len(usable):
        raise InputError(
            f"n_first_tokens is {n}, but only {len(usable)} tokens of the vocabulary are not special. "
            f"Give at most {len(usable)}."
        )
    drawn = np.random.default_rng(seed).choice(len(usable), size=n, replace=False)
    return [bare_row(place, (usable[at],)) for place, at in enumerate(drawn)]


def fixed_token(subject: Subject, rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The beginning of every text behind the same first token, and that token's text.

    Raises:
        InputError: There is only one text.
    """
    if len(rows) < 2:
        raise InputError("A fixed first token is compared over texts, and there is only one. Give at least 2.")
    bos: int | None = subject.tokenizer.bos_token_id
    token = rows[0].ids[0] if bos is None else bos
    length = min(_FIXED_TOKENS, subject.decoder.max_positions or _FIXED_TOKENS)
    starts = [row.ids if row.ids[0] == token else (token, *row.ids) for row in rows]
    return [bare_row(place, ids[:length]) for place, ids in enumerate(starts)], token_text(subject.tokenizer, token)
