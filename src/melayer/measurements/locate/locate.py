"""Where the massive activation emerges: the ME layer, its stages, and where it is erased again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from melayer.data.rows import Row
from melayer.errors import InputError
from melayer.measurements.criterion import STAGE_SHARE, WHOLE_SHARE, Criterion, find_me_layer, voting
from melayer.measurements.locate.result import (
    BlockRow,
    Emergence,
    LocateResult,
    MassiveScalar,
    NonFinite,
    SequenceRow,
    Stage,
    Trace,
)
from melayer.measurements.locate.trajectory import Follow, courses, shares_of
from melayer.measurements.settings import settings_of
from melayer.measurements.summaries import SequenceSummary, summaries_of
from melayer.model.decoder import Decoder
from melayer.model.provenance import ModelInfo
from melayer.model.subject import Subject
from melayer.numerics.summary import MAP_TOKENS
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_listed: int = 16,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> LocateResult:
    """Where the massive activation of a model emerges, grows and is erased.

    One pass over the texts keeps summaries of every block's output. A second one follows the massive tokens
    alone: a token sees only what is before it, so the rest of its sequence is left out.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to run; by default a small varied set that melayer brings along.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: Thresholds, persistence and majority.
        max_listed: How many massive scalars to list for each sequence and block; all are counted.
        max_batch_tokens: Tokens in one forward pass, padding counted.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Returns:
        The result, on the host. "None found" is a result.

    Raises:
        InputError: The texts or the options make no measurement.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> result = melayer.locate(model, tokenizer, texts=["The sky is clear today."])  # doctest: +SKIP
        >>> result.me_layer, result.emergence  # doctest: +SKIP
        (11, 'single')
    """
    return locate_on(
        Subject.of(model, tokenizer, parts=parts, name=name),
        texts=texts,
        max_tokens=max_tokens,
        bos=bos,
        criterion=criterion,
        max_listed=max_listed,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


def locate_on(
    subject: Subject,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_listed: int = 16,
    max_batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> LocateResult:
    """As `locate`, on a model that was read already."""
    criterion = criterion or Criterion()
    if max_listed < 1:
        raise InputError(f"max_listed is {max_listed}; expected at least 1.")
    decoder = subject.decoder
    rows = subject.rows(texts, max_tokens=max_tokens, bos=bos)
    summaries = summaries_of(
        decoder, rows, criterion, k=max_listed, max_batch_tokens=max_batch_tokens, progress=progress
    )
    return conclude(
        decoder,
        rows,
        summaries,
        criterion,
        subject.info,
        settings_of(rows, texts, max_tokens, bos),
        lambda targets: courses(decoder, targets, max_batch_tokens=max_batch_tokens),
    )


def classify(shares: Sequence[float]) -> Emergence:
    """`single`: one block adds 90 %; `staged`: two or three add 10 % each and 90 % together; else `gradual`."""
    stages = [share for share in shares if share >= STAGE_SHARE]
    if any(share >= WHOLE_SHARE for share in stages):
        return "single"
    if 2 <= len(stages) <= 3 and sum(stages) >= WHOLE_SHARE:
        return "staged"
    return "gradual"


def conclude(
    decoder: Decoder,
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    criterion: Criterion,
    model: ModelInfo,
    settings: Mapping[str, Any],
    follow: Follow,
    more_notes: Sequence[str] = (),
) -> LocateResult:
    """The result, from the summaries and from the courses of the massive tokens.

    Args:
        decoder: The model's parts.
        rows: The sequences that were run.
        summaries: Of each row, as far as the run went.
        criterion: Thresholds, persistence and majority.
        model: What the result says about the model.
        settings: What it says about how it came to be.
        follow: Gives the courses of the tokens that it is asked for.
        more_notes: Put behind its own notes.
    """
    notes = []
    voters = voting(rows, criterion)
    if all(len(row) < criterion.min_tokens for row in rows):
        notes.append(
            f"The criterion is not meaningful here: every text has fewer than {criterion.min_tokens} tokens, and the "
            "median needs ordinary tokens beside the massive one. Give longer texts."
        )
    elif len(voters) < len(rows):
        notes.append(
            f"Too short to vote on the ME layer (fewer than {criterion.min_tokens} tokens): "
            f"{len(rows) - len(voters)} of {len(rows)} texts."
        )
    dropped = [row.index for row in rows if row.n_dropped]
    if dropped:
        notes.append(f"Cut to {max(map(len, rows))} tokens: {len(dropped)} of {len(rows)} texts.")
    holding = np.stack([summaries[row.index].n_massive[1:] > 0 for row in rows])
    finite = np.stack([summaries[row.index].n_non_finite[1:] == 0 for row in rows])
    holding &= finite
    me_layer = find_me_layer(holding[voters], criterion, decoder.n_layers)
    n_run = holding.shape[1]
    targets = {}
    if me_layer is not None:
        targets = {
            row.index: (row, int(summaries[row.index].tokens[me_layer + 1, 0]))
            for row in rows
            if holding[row.index, me_layer]
        }
    non_finite = _first_non_finite(rows, summaries)
    trace, followed = _follow(follow, rows, summaries, targets, drawn=non_finite is None)
    followed = {sequence: found for sequence, found in followed.items() if sequence in voters}
    mean = np.mean([shares for _, _, shares in followed.values()], axis=0) if followed else np.zeros((0, 3))
    shares = tuple(
        Stage(layer, *(None if np.isnan(part) else float(part) for part in mean[layer]))  # type: ignore[arg-type]
        for layer in range(len(mean))
    )
    peaks = [peak for peak, _, _ in followed.values()]
    emergences = {sequence: classify(shares[:, 0].tolist()) for sequence, (_, _, shares) in followed.items()}
    differing = sorted(set(emergences.values()))
    if len(differing) > 1:
        notes.append(f"The texts differ in how it emerges ({', '.join(differing)}); the shares are means over them.")
    return LocateResult(
        model=model,
        criterion=criterion,
        settings=dict(settings),
        me_layer=me_layer,
        emergence=classify(mean[:, 0].tolist()) if followed else "none",
        stages=tuple(stage for stage in shares if stage.share >= STAGE_SHARE),
        erased_at=tuple(stage.layer for stage in shares if stage.share <= -STAGE_SHARE and n_run == decoder.n_layers),
        peak_layer=max(set(peaks), key=peaks.count) if peaks else None,
        shares=shares,
        embedding_share=float(np.mean([share for _, share, _ in followed.values()])) if followed else None,
        blocks=tuple(_block_row(layer, rows, summaries, holding[voters]) for layer in range(n_run)),
        embedding_max_abs=_finite(max(abs(summary.values[0, 0]) for summary in summaries.values())),
        massive=tuple(_massive(rows, summaries, holding, criterion)),
        sequences=tuple(
            SequenceRow(
                index=row.index,
                text=row.text if len(row.text) <= 80 else row.text[:79] + "…",
                n_tokens=len(row),
                n_dropped=row.n_dropped,
                first_token=row.tokens[0],
                has_bos=row.has_bos,
                votes=row.index in voters,
                holds=None if me_layer is None else bool(holding[row.index, me_layer]),
                massive_token_index=targets[row.index][1] if row.index in targets else None,
                massive_token=row.tokens[targets[row.index][1]] if row.index in targets else None,
                emergence=emergences.get(row.index),
            )
            for row in rows
        ),
        non_finite=non_finite,
        notes=(*notes, *more_notes),
        trace=trace,
    )


def _follow(
    follow: Follow,
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    targets: Mapping[int, tuple[Row, int]],
    *,
    drawn: bool,
) -> tuple[Trace | None, dict[int, tuple[int, float, NDArray[np.float64]]]]:
    """The course to draw, and for each sequence of `targets` its peak and shares."""
    if targets:
        shown = min(targets)
    else:
        # Nothing massive to follow: draw the token with the largest value, so that its absence can be seen.
        shown = max(summaries, key=lambda index: np.abs(np.nan_to_num(summaries[index].values[1:, 0])).max())
    summary = summaries[shown]
    highest = int(np.abs(np.nan_to_num(summary.values[1:, 0])).argmax())
    wanted = dict(targets) or ({shown: (rows[shown], int(summary.tokens[highest + 1, 0]))} if drawn else {})
    trace, followed = None, {}
    for sequences, course in follow(wanted):
        # A course that ends in NaN has no peak; the result names where it ends.
        if targets and np.isfinite(course.block_out).all():
            found = shares_of(course)
            followed.update(dict.fromkeys(sequences, found))
        if shown in sequences:
            row, token = wanted[shown]
            trace = Trace(
                sequence=shown,
                token_index=token,
                token=row.tokens[token],
                states=course.block_out,
                token_max=summary.token_max[1:, : min(len(row), MAP_TOKENS)],
                tokens=row.tokens[:MAP_TOKENS],
            )
    return trace, followed


def _block_row(
    layer: int, rows: Sequence[Row], summaries: Mapping[int, SequenceSummary], holding: NDArray[np.bool_]
) -> BlockRow:
    at = layer + 1

    def size(row: Row) -> float:
        value = abs(float(summaries[row.index].values[at, 0]))
        return math.inf if math.isnan(value) else value

    row = max(rows, key=size)
    summary = summaries[row.index]
    token = int(summary.tokens[at, 0])
    max_abs, median = _finite(abs(summary.values[at, 0])), _finite(summary.median_abs[at])
    return BlockRow(
        layer=layer,
        max_abs=max_abs,
        sequence=row.index,
        token_index=token,
        token=row.tokens[token],
        dim=int(summary.dims[at, 0]),
        median_abs=median,
        ratio=max_abs / median if max_abs is not None and median else None,
        top_norm=_finite(summary.top_norm[at]),
        others_norm=_finite(summary.others_norm[at]),
        n_massive=sum(int(s.n_massive[at]) for s in summaries.values() if s.n_non_finite[at] == 0),
        n_holding=int(holding[:, layer].sum()),
        n_non_finite=sum(int(s.n_non_finite[at]) for s in summaries.values()),
    )


def _massive(
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    holding: NDArray[np.bool_],
    criterion: Criterion,
) -> Iterable[MassiveScalar]:
    for layer in range(holding.shape[1]):
        for row in rows:
            if not holding[row.index, layer]:
                continue
            summary = summaries[row.index]
            at = layer + 1
            bound = max(criterion.min_abs, criterion.min_ratio * float(summary.median_abs[at]))
            for value, token, dim in zip(summary.values[at], summary.tokens[at], summary.dims[at], strict=True):
                if abs(value) > bound:
                    yield MassiveScalar(layer, row.index, int(token), row.tokens[token], int(dim), float(value))


def _first_non_finite(rows: Sequence[Row], summaries: Mapping[int, SequenceSummary]) -> NonFinite | None:
    n_sites = len(summaries[rows[0].index].n_non_finite)
    for at in range(n_sites):
        for row in rows:
            summary = summaries[row.index]
            if summary.n_non_finite[at]:
                return NonFinite(
                    layer=at - 1 if at else None,
                    sequence=row.index,
                    token_index=int(summary.tokens[at, 0]),
                    dim=int(summary.dims[at, 0]),
                    value=str(summary.values[at, 0]),
                )
    return None


def _finite(value: float | np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None
