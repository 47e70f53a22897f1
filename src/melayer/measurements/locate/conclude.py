"""From summaries of every block and trajectories of the massive tokens to what `locate` says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from melayer.data.rows import Row, bos_note
from melayer.measurements.criterion import STAGE_SHARE, Criterion, find_me_layer, voting
from melayer.measurements.locate.figures import (
    BlockRow,
    Emergence,
    MassiveDim,
    MassiveScalar,
    NonFinite,
    Peak,
    SequenceRow,
    Trace,
)
from melayer.measurements.locate.peak import classify, mean_shares, peak_of
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.locate.trajectory import Follow, Growth, Targets, growth_of
from melayer.measurements.locate.words import HALF
from melayer.measurements.settings import LocateSettings
from melayer.measurements.summaries import MassiveDims, SequenceSummary, holding_of
from melayer.model.provenance import ModelInfo
from melayer.numerics.finite import finite
from melayer.numerics.summary import MAP_TOKENS
from melayer.presentation.numbers import share

Summaries = Mapping[int, SequenceSummary]
"""By the row's index."""

_SHOWN_CHARACTERS = 80  # of a text, in the result


def conclude(
    rows: Sequence[Row],
    summaries: Summaries,
    dims: MassiveDims,
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
        dims: The massive scalars of every dimension in these rows.
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
    shares = mean_shares(list(growths.values()))
    peaks = [growth.peak_layer for growth in growths.values()]
    peak = None if me_layer is None else peak_of(rows, summaries, targets, growths, me_layer, follow)
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
        massive=tuple(_massive(rows, summaries, holding)),
        sequences=tuple(
            _sequence_row(
                row,
                votes=row.index in voters,
                holds=None if me_layer is None else bool(holding[row.index, me_layer]),
                massive_token=targets[row.index][1] if row.index in targets else None,
                emergence=emergences.get(row.index),
                massive_tokens=_massive_tokens(summaries[row.index], holding[row.index], me_layer or 0),
            )
            for row in rows
        ),
        non_finite=non_finite,
        notes=(*_notes(rows, voters, criterion, emergences.values()), *_notes_on_peak(me_layer, peak), *more_notes),
        trace=trace,
        massive_dims=tuple(_massive_dims(dims, n_run)),
        least_threshold=None if me_layer is None else _least_threshold(summaries, holding, criterion, me_layer),
        peak=peak,
    )


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


def _notes_on_peak(me_layer: int | None, peak: Peak | None) -> Iterator[str]:
    """What goes by the ME layer goes by a block after which little of the peak stands."""
    if peak is not None and peak.standing_share < HALF:
        yield (
            f"Of the peak {share(peak.standing_share)} stands at the output of block {me_layer}. What goes by the ME "
            "layer (figures “after the ME layer”, the default blocks of a mask) begins there all the same, before most "
            "of the growth; to mask other blocks, name them (--layers)."
        )


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


def _massive(rows: Sequence[Row], summaries: Summaries, holding: NDArray[np.bool_]) -> Iterator[MassiveScalar]:
    """The scalars that meet the criterion, as many as the summaries kept: a list to read, not to compute with."""
    for layer in range(holding.shape[1]):
        for row in rows:
            if not holding[row.index, layer]:
                continue
            summary, at = summaries[row.index], layer + 1
            # The largest come first, so that the massive ones among them are as many as were counted.
            n = min(int(summary.n_massive[at]), len(summary.values[at]))
            for value, token, dim in zip(
                summary.values[at, :n], summary.tokens[at, :n], summary.dims[at, :n], strict=True
            ):
                yield MassiveScalar(layer, row.index, int(token), row.tokens[token], int(dim), float(value))


def _massive_tokens(summary: SequenceSummary, holding: NDArray[np.bool_], start: int) -> tuple[int, ...]:
    """The tokens with a massive scalar at the output of block `start` or later; holding: [blocks run] where any is."""
    tokens = {
        token for layer in np.flatnonzero(holding).tolist() if layer >= start for token in summary.massive_at(layer)
    }
    return tuple(sorted(tokens))


def _massive_dims(dims: MassiveDims, n_run: int) -> Iterator[MassiveDim]:
    for layer in range(n_run):
        counts, sums = dims.at(layer)
        for dim in np.flatnonzero(counts).tolist():
            yield MassiveDim(layer, dim, int(counts[dim]), float(sums[dim] / counts[dim]))


def _least_threshold(
    summaries: Summaries, holding: NDArray[np.bool_], criterion: Criterion, layer: int
) -> float | None:
    """The lowest threshold at a block over the sequences that hold there, in the arithmetic that counted them."""
    ratio, least = np.float32(criterion.min_ratio), np.float32(criterion.min_abs)
    bounds = [
        max(least, ratio * summaries[index].median_abs[layer + 1])
        for index in np.flatnonzero(holding[:, layer]).tolist()
    ]
    return float(min(bounds)) if bounds else None


def _sequence_row(
    row: Row,
    *,
    votes: bool,
    holds: bool | None,
    massive_token: int | None,
    emergence: Emergence | None,
    massive_tokens: tuple[int, ...],
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
        massive_tokens=massive_tokens,
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
