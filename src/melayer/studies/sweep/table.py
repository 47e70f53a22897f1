"""A sweep result at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.presentation.tables import ABSENT, change, number, percent, print_answer, print_text, table

if TYPE_CHECKING:
    from melayer.studies.sweep.result import SweepResult


def show_sweep(result: SweepResult, console: Console) -> None:
    """Prints a sweep result: the answer, then the plain model and each mask, a line each."""
    print_answer(console, result.sentence, result.notes)
    console.print(_points(result))
    if any(result.difference(point) for point in result.masked):
        console.print(_differences(result))
    model, settings, at = result.model, result.settings, result.me_layer
    blocks = "all after it" if settings["layers"] is None else ", ".join(map(str, settings["layers"]))
    print_text(
        console,
        f"sinks: the share of (sequence, head) in which key 0 draws more than {result.epsilon:g} of the attention, "
        f"over all blocks and over those after the ME layer (block {at}). cosine: of the massive token's state "
        "between neighbouring blocks, mean from the ME layer until it is erased. read, stream: effective rank of what "
        "attention reads and of the residual stream after the ME layer, with the massive tokens and without. "
        "Intervals are at 95 %, by sequence and paired with the plain model; each stands alone: of twenty one leaves "
        f"out 0 by chance. Masked blocks: {blocks}; strength {settings['strength']:g}. Perplexity and sinks depend on "
        f"T, so compare only the same T. {model.name}, {model.dtype}, fingerprint {model.fingerprint}. Blocks and "
        "keys are 0-based.",
        style="dim",
    )


def _points(result: SweepResult) -> Table:
    columns = [("mask", False), ("rate", True), ("perplexity", True), ("change", True), ("sinks", True)]
    columns += [("after", True), ("cosine", True), ("read", True), ("stream", True)]
    rows = [
        [
            point.selector or "plain",
            ABSENT if point.selector is None else f"{point.rate:g}",
            number(point.perplexity, 2),
            ABSENT if point.selector is None else change(result.change(point)),
            f"{point.sink_rate:.1%}",
            percent(point.sink_rate_after_me),
            number(point.cosine_rigid, 4),
            _both(point.rank_attn_in, point.rank_attn_in_without),
            _both(point.rank_block_out, point.rank_block_out_without),
        ]
        for point in result.points
    ]
    return table(f"Masks, T = {result.T}, {result.n_sequences} sequences", columns, rows)


def _differences(result: SweepResult) -> Table:
    columns = [("mask", False), ("rate", True), ("nats a token", True), ("interval", True), ("perplexity", True)]
    rows = []
    for point in result.masked:
        by, ends = result.difference(point), result.change_interval(point)
        if by is not None:
            nats = ABSENT if by.low is None or by.high is None else f"{by.low:+.3f}..{by.high:+.3f}"
            change = ABSENT if ends is None else f"{ends[0]:+.1%}..{ends[1]:+.1%}"
            rows.append([point.selector, f"{point.rate:g}", f"{by.value:+.3f}", nats, change])
    return table("Against the plain model (above 0: predicted worse)", columns, rows)


def _both(with_massive: float | None, without: float | None) -> str:
    return ABSENT if with_massive is None else f"{with_massive:.1f}/{number(without, 1)}"
