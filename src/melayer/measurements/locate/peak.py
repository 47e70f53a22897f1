"""Where the massive activation is largest, and what the ME layer's block has to do with it.

The ME layer is the first block at whose output the criterion holds. Where the activation grows on, and moves to another
dimension or token, that block need not be the one that creates what stands at the peak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from melayer.data.rows import Row
from melayer.measurements.criterion import STAGE_SHARE, WHOLE_SHARE
from melayer.measurements.locate.figures import Emergence, Peak, Stage
from melayer.measurements.locate.trajectory import Follow, Growth, Targets, growth_of
from melayer.measurements.summaries import SequenceSummary
from melayer.numerics.finite import finite


@dataclass(frozen=True)
class _Largest:
    """The largest finite |h| of one sequence at any block's output."""

    layer: int
    token: int
    dim: int
    max_abs: float


def classify(shares: Sequence[float]) -> Emergence:
    """`single`: one block adds 90 %; `staged`: two or three add 10 % each and 90 % together; else `gradual`."""
    stages = [share for share in shares if share >= STAGE_SHARE]
    if any(share >= WHOLE_SHARE for share in stages):
        return "single"
    if 2 <= len(stages) <= 3 and sum(stages) >= WHOLE_SHARE:
        return "staged"
    return "gradual"


def mean_shares(growths: Sequence[Growth]) -> tuple[Stage, ...]:
    """The share of every block, mean over the sequences; empty where none was followed."""
    if not growths:
        return ()
    mean = np.mean([growth.shares for growth in growths], axis=0)
    return tuple(
        Stage(layer, float(whole), finite(attn), finite(ffn)) for layer, (whole, attn, ffn) in enumerate(mean.tolist())
    )


def peak_of(
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    targets: Targets,
    growths: Mapping[int, Growth],
    me_layer: int,
    follow: Follow,
) -> Peak | None:
    """The peak over the sequences whose massive token was followed; None where there is none.

    Args:
        rows: The sequences that were run.
        summaries: Of each.
        targets: The massive token of each, that of the largest |h| at the ME layer's output.
        growths: Who wrote the peak state of that token, of the sequences to look at.
        me_layer: The ME layer.
        follow: Gives the trajectories of further tokens: where another token than the massive one holds the peak.
    """
    largest = {sequence: _largest(summaries[sequence]) for sequence in growths}
    if not largest:
        return None
    top = max(largest, key=lambda sequence: largest[sequence].max_abs)
    elsewhere = {
        sequence: (rows[sequence], at.token) for sequence, at in largest.items() if at.token != targets[sequence][1]
    }
    of_peak = dict(growths)
    for sequences, trajectory in follow(elsewhere) if elsewhere else ():
        if np.isfinite(trajectory.block_out).all():
            of_peak.update(dict.fromkeys(sequences, growth_of(trajectory)))
    shares = mean_shares(list(of_peak.values()))
    embedding = float(np.mean([growth.embedding_share for growth in of_peak.values()]))
    at = largest[top]
    return Peak(
        layer=at.layer,
        sequence=top,
        token_index=at.token,
        token=rows[top].tokens[at.token],
        dim=at.dim,
        max_abs=at.max_abs,
        me_share=shares[me_layer].share,
        standing_share=embedding + sum(stage.share for stage in shares[: me_layer + 1]),
        emergence=classify([stage.share for stage in shares]),
        shares=shares,
        embedding_share=embedding,
        n_sequences=len(largest),
        n_other_token=len(elsewhere),
        n_other_dim=sum(of.dim != int(summaries[place].dims[me_layer + 1, 0]) for place, of in largest.items()),
    )


def _largest(summary: SequenceSummary) -> _Largest:
    size = np.abs(summary.values[1:, 0])
    size = np.where(np.isfinite(size), size, -1.0)
    layer = int(size.argmax())
    return _Largest(layer, int(summary.tokens[layer + 1, 0]), int(summary.dims[layer + 1, 0]), float(size[layer]))
