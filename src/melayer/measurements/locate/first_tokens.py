"""Whether the finding hangs on the first token: a few short texts again, with the other first tokens that there are.

The first token of a sequence sees only itself, so it alone decides whether it becomes massive; where it does not,
another token may, or none. What can stand first is: the text's own beginning, BOS, and what a chat begins with under
the tokenizer's template, of which one token is enough for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from melayer.data.chat import render
from melayer.data.rows import Row, batches, token_text
from melayer.errors import InputError, border, reason
from melayer.measurements.criterion import Criterion, find_me_layer, voting
from melayer.measurements.locate.figures import FirstToken, FirstTokens, Start
from melayer.measurements.summaries import SequenceSummary, holding_of, summaries_of
from melayer.model.forward import embedding_weight
from melayer.model.subject import Subject
from melayer.numerics.finite import finite

TEXTS, TOKENS = 3, 32
"""How many of the texts are looked at, and how many tokens of each."""

Ids = tuple[tuple[int, ...], ...]


def first_tokens_on(
    subject: Subject, rows: Sequence[Row], criterion: Criterion, *, max_batch_tokens: int
) -> FirstTokens:
    """What is found in the first texts that vote, cut short, as they are run and with each other first token.

    Args:
        subject: The model.
        rows: The sequences as they are run.
        criterion: What counts as massive, and as the ME layer.
        max_batch_tokens: Tokens in one forward pass.
    """
    voters = set(voting(rows, criterion))
    chosen = [row for row in rows if row.index in voters][:TEXTS]
    length = min(max(TOKENS, criterion.min_tokens), max(map(len, chosen)))
    starts, notes = _starts(subject, chosen, length)
    every = [_row(subject, ids) for of in starts for ids in of]
    numbered = [Row(place, "", row.ids, row.tokens, 0, has_bos=False) for place, row in enumerate(every)]
    passes = list(batches(numbered, max_batch_tokens=max_batch_tokens))
    summaries = summaries_of(subject.decoder, passes, criterion, k=1)
    found = []
    for place, kinds in enumerate(starts.values()):
        of = numbered[place * len(chosen) : (place + 1) * len(chosen)]
        found.append(_found(kinds, of, summaries, criterion))
    return FirstTokens(len(chosen), length, tuple(found), tuple(notes))


def _row(subject: Subject, ids: tuple[int, ...]) -> Row:
    return Row(0, "", ids, tuple(token_text(subject.tokenizer, token) for token in ids), 0, has_bos=False)


def _starts(subject: Subject, chosen: Sequence[Row], length: int) -> tuple[dict[Ids, tuple[Start, ...]], list[str]]:
    """The ids of the texts under each first token, with what that is, those as they are run first; and notes."""
    notes: list[str] = []
    bos = subject.tokenizer.bos_token_id
    plain = [_plain(subject, row, bos) for row in chosen]
    wanted: list[tuple[Start, Ids]] = [("as run", tuple(row.ids[:length] for row in chosen))]
    if all(plain):
        wanted.append(("no bos", tuple(ids[:length] for ids in plain)))
    heads: list[tuple[Start, int | None]] = [("bos", bos), ("template", _template_start(subject, notes))]
    known = embedding_weight(subject.model).shape[0]
    for kind, head in heads:
        if head is not None and head < known:
            wanted.append((kind, tuple((ids if ids[:1] == (head,) else (head, *ids))[:length] for ids in plain)))
    starts: dict[Ids, tuple[Start, ...]] = {}
    for kind, of in wanted:
        starts[of] = (*starts.get(of, ()), kind)
    return starts, notes


def _plain(subject: Subject, row: Row, bos: int | None) -> tuple[int, ...]:
    """A text's own ids, without BOS, whoever put it there; empty where it has no others."""
    ids = tuple(subject.tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[1:] if bos is not None and ids[:1] == (bos,) else ids


def _template_start(subject: Subject, notes: list[str]) -> int | None:
    """The first token of a chat under the tokenizer's template; None where there is no template, or it fails."""
    tokenizer = subject.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        with border("The chat template cannot be applied", "Its first token was not looked at."):
            text = render(tokenizer, [{"role": "user", "content": "a"}])
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except InputError as error:
        why = reason(error.__cause__ or error)
        notes.append(f"The chat template cannot be applied: {why}. Its first token was not looked at.")
        return None
    return int(ids[0]) if ids else None


def _found(
    kinds: tuple[Start, ...], rows: Sequence[Row], summaries: Mapping[int, SequenceSummary], criterion: Criterion
) -> FirstToken:
    """What is found in the texts under one first token."""
    holding = holding_of(rows, summaries)
    places = {row.index: place for place, row in enumerate(rows)}
    votes = [places[index] for index in voting(rows, criterion)]
    me_layer = find_me_layer(holding[votes].sum(axis=0), len(votes), criterion)
    holds = holding.any(axis=1) if me_layer is None else holding[:, me_layer]
    top, layer = max(
        ((row, layer) for row in rows for layer in range(summaries[row.index].n_run)),
        key=lambda at: _size(summaries[at[0].index], at[1]),
    )
    summary = summaries[top.index]
    token = int(summary.tokens[layer + 1, 0])
    first = {row.tokens[0] for row in rows}
    return FirstToken(
        kinds=kinds,
        token=first.pop() if len(first) == 1 else None,
        me_layer=me_layer,
        n_holding=int(holds.sum()),
        n_first_massive=sum(0 in _massive(summaries[row.index], holding[places[row.index]], me_layer) for row in rows),
        max_abs=finite(_size(summary, layer)),
        layer=layer,
        massive_token_index=token,
        massive_token=top.tokens[token],
        dim=int(summary.dims[layer + 1, 0]),
    )


def _massive(summary: SequenceSummary, holding: np.ndarray, me_layer: int | None) -> Iterator[int]:
    """The tokens of a sequence that are massive at the ME layer's output, or at any where there is none."""
    layers = range(len(holding)) if me_layer is None else [me_layer]
    return (token for layer in layers if holding[layer] for token in summary.massive_at(layer))


def _size(summary: SequenceSummary, layer: int) -> float:
    value = abs(float(summary.values[layer + 1, 0]))
    return value if np.isfinite(value) else -1.0
