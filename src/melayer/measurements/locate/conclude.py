"""From summaries of every block and trajectories of the massive tokens to what `locate` says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from melayer.data.rows import Row, bos_note
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
from melayer.measurements.locate.trajectory import Follow, Growth, Targets, growth_of
from melayer.measurements.settings import LocateSettings
from melayer.measurements.summaries import SequenceSummary, holding_of
from melayer.model.provenance import ModelInfo
from melayer.numerics.finite import finite
from melayer.numerics.summary import MAP_TOKENS

Summaries = Mapping[int, SequenceSummary]
"""By the row's index."""

_SHOWN_CHARACTERS = 80  # of a text, in the result


def conclude(
    rows: Sequence[Row],
    summaries: Summaries,
    criterion: Criterion,
    model: ModelInfo,
    settings: LocateSettings,
    follow: Follow,
    more_notes: Iterable[str] = (),
) -> LocateResult:
    """The result, from the summaries and from the trajectories of the massive tokens.

    Args:
        rows: The sequences that were run.
        summaries: Of each row, as far as the run went.
        criterion: Thresholds, persistence and majority.
        model: What the result says about the model.
        settings: What it says about how it came to be.
        follow: Gives the trajectories of the tokens that it is asked for.
        more_notes: Put behind its own notes.
    """
    voters = voting(rows, criterion)
    holding = holding_of(rows, summaries)
    n_run = holding.shape[1]
    me_layer = find_me_layer(holding[voters].sum(axis=0), len(voters), criterion, n_layers=model.n_layers)
    targets = {} if me_layer is None else _targets(rows, summaries, holding, me_layer)
    non_finite = _first_non_finite(rows, summaries)
    trace, growths = _follow(follow, rows, summaries, targets, drawn=non_finite is None)
    growths = {sequence: growth for sequence, growth in growths.items() if sequence in voters}
    emergences = {sequence: classify(growth.shares[:, 0].tolist()) for sequence, growth in growths.items()}
    shares = _mean_shares(list(growths.values()))
    peaks = [growth.peak_layer for growth in growths.values()]
    return LocateResult(
        model=model,
        criterion=criterion,
        settings=settings,
        me_layer=me_layer,
        emergence=classify([stage.share for stage in shares]) if shares else "none",
        stages=tuple(stage for stage in shares if stage.share >= STAGE_SHARE),
        erased_at=tuple(stage.layer for stage in shares if stage.share <= -STAGE_SHARE and n_run == model.n_layers),
        peak_layer=max(set(peaks), key=peaks.count) if peaks else None,
        shares=shares,
        embedding_share=float(np.mean([growth.embedding_share for growth in growths.values()])) if growths else None,
        blocks=tuple(_block_row(layer, rows, summaries, holding[voters]) for layer in range(n_run)),
        embedding_max_abs=finite(max(abs(summary.values[0, 0]) for summary in summaries.values())),
        massive=tuple(_massive(rows, summaries, holding, criterion)),
        sequences=tuple(
            _sequence_row(
                row,
                votes=row.index in voters,
                holds=None if me_layer is None else bool(holding[row.index, me_layer]),
                massive_token=targets[row.index][1] if row.index in targets else None,
                emergence=emergences.get(row.index),
            )
            for row in rows
        ),
        non_finite=non_finite,
        notes=(*_notes(rows, voters, criterion, emergences.values()), *more_notes),
        trace=trace,
    )


def classify(shares: Sequence[float]) -> Emergence:
    """`single`: one block adds 90 %; `staged`: two or three add 10 % each and 90 % together; else `gradual`."""
    stages = [share for share in shares if share >= STAGE_SHARE]
    if any(share >= WHOLE_SHARE for share in stages):
        return "single"
    if 2 <= len(stages) <= 3 and sum(stages) >= WHOLE_SHARE:
        return "staged"
    return "gradual"


def _notes(
    rows: Sequence[Row], voters: Sequence[int], criterion: Criterion, emergences: Iterable[Emergence]
) -> Iterator[str]:
    """What the reader has to know of the texts."""
    if said := bos_note(rows):
        yield said
    if all(len(row) < criterion.min_tokens for row in rows):
        yield (
            f"The criterion is not meaningful here: every text has fewer than {criterion.min_tokens} tokens, and the "
            "median needs ordinary tokens beside the massive one. Give longer texts."
        )
    elif len(voters) < len(rows):
        yield (
            f"Too short to vote on the ME layer (fewer than {criterion.min_tokens} tokens): "
            f"{len(rows) - len(voters)} of {len(rows)} texts."
        )
    n_cut = sum(row.n_dropped > 0 for row in rows)
    if n_cut:
        yield f"Cut to {max(map(len, rows))} tokens: {n_cut} of {len(rows)} texts."
    differing = sorted(set(emergences))
    if len(differing) > 1:
        yield f"The texts differ in how it emerges ({', '.join(differing)}); the shares are means over them."


# --- the massive token of each sequence ------------------------------------------------------------------------------


def _targets(rows: Sequence[Row], summaries: Summaries, holding: NDArray[np.bool_], me_layer: int) -> Targets:
    """The token with the largest scalar at the ME layer's output, in each sequence where the criterion holds there."""
    return {
        row.index: (row, int(summaries[row.index].tokens[me_layer + 1, 0]))
        for row in rows
        if holding[row.index, me_layer]
    }


def _follow(
    follow: Follow, rows: Sequence[Row], summaries: Summaries, targets: Targets, *, drawn: bool
) -> tuple[Trace | None, dict[int, Growth]]:
    """The trajectory to draw, and who wrote the peak state of each sequence in `targets`.

    Args:
        follow: Gives trajectories.
        rows: The sequences that were run.
        summaries: Of each row.
        targets: The massive tokens.
        drawn: Whether to draw another token's trajectory where there are none.
    """
    if targets:
        shown = min(targets)
    else:
        # Nothing massive to follow: draw the token with the largest value, so that its absence can be seen.
        shown = max(summaries, key=lambda index: np.abs(np.nan_to_num(summaries[index].values[1:, 0])).max())
    summary = summaries[shown]
    highest = int(np.abs(np.nan_to_num(summary.values[1:, 0])).argmax())
    asked = targets or ({shown: (rows[shown], int(summary.tokens[highest + 1, 0]))} if drawn else {})
    trace, growths = None, {}
    for sequences, trajectory in follow(asked):
        # A trajectory that ends in NaN has no peak; the result names where it ends.
        if targets and np.isfinite(trajectory.block_out).all():
            growths.update(dict.fromkeys(sequences, growth_of(trajectory)))
        if shown in sequences:
            row, token = asked[shown]
            trace = Trace(
                sequence=shown,
                token_index=token,
                token=row.tokens[token],
                states=trajectory.block_out,
                token_max=summary.token_max[1:, : min(len(row), MAP_TOKENS)],
                tokens=row.tokens[:MAP_TOKENS],
            )
    return trace, growths


def _mean_shares(growths: Sequence[Growth]) -> tuple[Stage, ...]:
    """The share of every block, mean over the sequences; empty where none was followed."""
    if not growths:
        return ()
    mean = np.mean([growth.shares for growth in growths], axis=0)
    return tuple(
        Stage(layer, float(whole), finite(attn), finite(ffn)) for layer, (whole, attn, ffn) in enumerate(mean.tolist())
    )


# --- rows of the result ----------------------------------------------------------------------------------------------


def _block_row(layer: int, rows: Sequence[Row], summaries: Summaries, holding: NDArray[np.bool_]) -> BlockRow:
    """What stands at one block's output; `holding` [voters, blocks run] is of the sequences that vote."""
    at = layer + 1

    def size(row: Row) -> float:
        value = abs(float(summaries[row.index].values[at, 0]))
        return math.inf if math.isnan(value) else value

    row = max(rows, key=size)
    summary = summaries[row.index]
    token = int(summary.tokens[at, 0])
    max_abs, median = finite(abs(summary.values[at, 0])), finite(summary.median_abs[at])
    return BlockRow(
        layer=layer,
        max_abs=max_abs,
        sequence=row.index,
        token_index=token,
        token=row.tokens[token],
        dim=int(summary.dims[at, 0]),
        median_abs=median,
        ratio=max_abs / median if max_abs is not None and median else None,
        top_norm=finite(summary.top_norm[at]),
        others_norm=finite(summary.others_norm[at]),
        n_massive=sum(int(s.n_massive[at]) for s in summaries.values() if s.n_non_finite[at] == 0),
        n_holding=int(holding[:, layer].sum()),
        n_non_finite=sum(int(s.n_non_finite[at]) for s in summaries.values()),
    )


def _massive(
    rows: Sequence[Row], summaries: Summaries, holding: NDArray[np.bool_], criterion: Criterion
) -> Iterator[MassiveScalar]:
    """The scalars that meet the criterion, as many as the summaries kept."""
    for layer in range(holding.shape[1]):
        for row in rows:
            if not holding[row.index, layer]:
                continue
            summary = summaries[row.index]
            at = layer + 1
            threshold = criterion.threshold(float(summary.median_abs[at]))
            for value, token, dim in zip(summary.values[at], summary.tokens[at], summary.dims[at], strict=True):
                if abs(value) > threshold:
                    yield MassiveScalar(layer, row.index, int(token), row.tokens[token], int(dim), float(value))


def _sequence_row(
    row: Row, *, votes: bool, holds: bool | None, massive_token: int | None, emergence: Emergence | None
) -> SequenceRow:
    return SequenceRow(
        index=row.index,
        text=row.text if len(row.text) <= _SHOWN_CHARACTERS else row.text[: _SHOWN_CHARACTERS - 1] + "…",
        n_tokens=len(row),
        n_dropped=row.n_dropped,
        first_token=row.tokens[0],
        has_bos=row.has_bos,
        votes=votes,
        holds=holds,
        massive_token_index=massive_token,
        massive_token=None if massive_token is None else row.tokens[massive_token],
        emergence=emergence,
    )


def _first_non_finite(rows: Sequence[Row], summaries: Summaries) -> NonFinite | None:
    """The first NaN or infinity, in the order in which the model computes."""
    for at in range(1 + summaries[rows[0].index].n_run):
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
