"""What the massive activation makes rigid: its token's state across blocks and inputs, and what attention reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from melayer.data.rows import Row, token_text
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate_on
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.locate.reuse import options_of, require_located_on
from melayer.measurements.locate.trajectory import Targets
from melayer.measurements.rigidity.cosines import across_blocks, across_inputs
from melayer.measurements.rigidity.effective_rank import MIN_RANK_TOKENS, effective_ranks
from melayer.measurements.rigidity.first_tokens import drawn_tokens, fixed_token
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.settings import LAYERS_COUNTED_FROM, criterion_settings, text_settings
from melayer.model.subject import Subject
from melayer.numerics.finite import finite_all
from melayer.numerics.seeds import require_seed
from melayer.runs.progress import Bar, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def rigidity(  # noqa: PLR0913 - public: every option has a name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    n_first_tokens: int = 64,
    fixed_first_token: bool = False,
    seed: int = 0,
    located: LocateResult | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> RigidityResult:
    """How rigid the massive token's state is across blocks and inputs, and how diverse the tokens are beside it.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to run; by default a small varied set that melayer brings along.
        n_first_tokens: How many different first tokens to draw from the vocabulary, special ones left out.
        fixed_first_token: Measure the trivial case instead: the same first token (BOS, or that of text 0) in every
            text. The first token sees only itself, so its cosine over inputs is then 1 by causality.
        seed: Of the draw.
        located: What `locate` found on the same texts; by default it is run. Its `bos`, `max_tokens` and criterion
            hold here too.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        bos: Whether the begin-of-sequence token comes first in the texts; None leaves it to the tokenizer. The drawn
            first tokens stand alone, without it.
        criterion: Thresholds, persistence and majority of the massive activation.
        max_batch_tokens: Tokens in one forward pass, padding counted.
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Returns:
        The result, on the host. Without a massive token it follows token 0 and says so.

    Raises:
        InputError: The texts or the options make no measurement, or `located` is of something else.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.rigidity(model, tokenizer).cosine_next[12]  # doctest: +SKIP
    """
    return rigidity_on(
        Subject.of(model, tokenizer, parts=parts, name=name or (located.model.name if located else None)),
        texts=texts,
        n_first_tokens=n_first_tokens,
        fixed_first_token=fixed_first_token,
        seed=seed,
        located=located,
        max_tokens=max_tokens,
        bos=bos,
        criterion=criterion,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


def rigidity_on(  # noqa: PLR0913 - the options of the public function
    subject: Subject,
    *,
    texts: Sequence[str] | None = None,
    n_first_tokens: int = 64,
    fixed_first_token: bool = False,
    seed: int = 0,
    located: LocateResult | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> RigidityResult:
    """As `rigidity`, on a model that was read already."""
    require_seed(seed)
    max_tokens, bos = options_of(located, criterion=criterion, max_tokens=max_tokens, bos=bos)
    rows = subject.rows(texts, max_tokens=max_tokens, bos=bos)
    first, first_text = (
        fixed_token(subject, rows) if fixed_first_token else (drawn_tokens(subject, n_first_tokens, seed), None)
    )
    n_tokens = sum(map(len, rows))
    bar = Bar(progress, n_tokens * (2 if located is None else 1))
    if located is None:
        located = locate_on(
            subject,
            texts=texts,
            max_tokens=max_tokens,
            bos=bos,
            criterion=criterion,
            max_batch_tokens=max_batch_tokens,
            progress=bar.part(n_tokens),
        )
    require_located_on(located, subject.info, rows)
    decoder = subject.decoder
    targets = _targets(located, rows)
    cosine_next, cosine_peak = across_blocks(decoder, targets, max_batch_tokens)
    inputs, inputs_massive, n_massive = across_inputs(
        decoder, first, None if fixed_first_token else located.me_layer, located.criterion.min_abs, max_batch_tokens
    )
    massive = _massive_tokens(located)
    ranked, notes_on_rank = _ranked(rows, massive)
    second = bar.part(n_tokens) or (lambda done, of: None)
    effective_rank = effective_ranks(decoder, ranked, massive, max_batch_tokens, lambda done: second(done, n_tokens))
    second(n_tokens, n_tokens)  # the texts that were not ranked, too
    return RigidityResult(
        model=subject.info,
        settings={
            "criterion": criterion_settings(located.criterion),
            **text_settings(rows, texts, max_tokens, bos),
            "seed": seed,
            "first_tokens": "fixed" if fixed_first_token else "drawn, each alone at position 0, without BOS",
            "fixed_first_token": first_text,
            "layers_counted_from": LAYERS_COUNTED_FROM,
        },
        me_layer=located.me_layer,
        erased_at=located.erased_at,
        n_sequences=len(targets),
        cosine_next=finite_all(cosine_next),
        cosine_peak=finite_all(cosine_peak),
        cosine_inputs=finite_all(inputs),
        cosine_inputs_massive=finite_all(inputs_massive),
        fixed_first_token=fixed_first_token,
        n_first_tokens=1 if fixed_first_token else len(first),
        n_massive_first_tokens=n_massive,
        effective_rank=effective_rank,
        tokens=float(np.median([len(row) for row in ranked])) if ranked else None,
        n_rank_sequences=len(ranked),
        notes=(*_notes(located, subject, rows, len(first), fixed_first_token), *notes_on_rank),
    )


def _targets(located: LocateResult, rows: Sequence[Row]) -> Targets:
    """The token to follow in each sequence: the massive one, or token 0 of all where there is no ME layer."""
    if located.me_layer is None:
        return {row.index: (row, 0) for row in rows}
    return {
        row.index: (rows[row.index], row.massive_token_index)
        for row in located.sequences
        if row.holds and row.massive_token_index is not None
    }


def _massive_tokens(located: LocateResult) -> dict[int, set[int]]:
    """All tokens of each sequence that hold a massive scalar from the ME layer on; none without an ME layer."""
    if located.me_layer is None:
        return {}
    return {row.index: set(row.massive_tokens) for row in located.sequences if row.massive_tokens}


def _ranked(rows: Sequence[Row], massive: Mapping[int, set[int]]) -> tuple[list[Row], list[str]]:
    """The sequences whose effective rank means something, and notes on the others."""
    notes = []
    counted = [row for row in rows if len(row) >= MIN_RANK_TOKENS and len(massive.get(row.index, ())) < len(row)]
    with_massive = [row for row in counted if row.index in massive]
    if len(counted) < len(rows):
        notes.append(
            f"Too short for an effective rank (fewer than {MIN_RANK_TOKENS} tokens, or all of them massive): "
            f"{len(rows) - len(counted)} of {len(rows)} texts."
        )
    if with_massive and len(with_massive) < len(counted):
        # With and without must be of the same sequences, or their difference would be that of the texts.
        notes.append(f"Effective ranks are over the {len(with_massive)} texts that have a massive token.")
    return with_massive or counted, notes


def _notes(located: LocateResult, subject: Subject, rows: Sequence[Row], n_first: int, fixed: bool) -> Iterator[str]:
    """What the reader has to know of the massive token and of the first tokens."""
    yield from located.notes
    if located.non_finite is not None:
        yield located.sentence
    if located.me_layer is None:
        yield "There is no massive token to follow: the figures are of token 0 of each text."
    if fixed:
        yield "The first token is fixed: its cosine over inputs is 1 by causality, whatever the model."
    elif any(row.has_bos for row in rows):
        bos = token_text(subject.tokenizer, int(subject.tokenizer.bos_token_id or 0))
        yield (
            f"The texts start with BOS ({bos}), which would be 1 "
            f"by causality over inputs: the {n_first} first tokens drawn stand in its place, without it."
        )
