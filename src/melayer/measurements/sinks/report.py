"""The report's section on what attention does with the massive activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from melayer.measurements.sinks.result import SinksResult
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, GREY, ORANGE, VERMILLION, Trace, axis, hover, stroke
from melayer.presentation.numbers import number, rectangle, rounded
from melayer.presentation.sections import Plot, Section, Table

TITLE = "What attention does with it"


def section(result: SinksResult) -> Section:
    """Plots of a sinks result, and the heads; what massive tokens draw elsewhere only where some stand elsewhere."""
    parts: list[Plot | Table] = [_heads(result), _rates(result)]
    if result.massive is not None and result.massive.n_not_first:
        parts.append(_massive(result))
    parts.append(_strongest(result))
    return Section("sinks", TITLE, result.sentence, parts)


def attention_map(alpha: Sequence[Sequence[float | None] | None], of: str = "") -> Trace:
    """The attention that a key draws as a heat map, block by head.

    Args:
        alpha: [layer][head] shares; None for a block without softmax attention, whose row stays empty.
        of: What it was measured on, where there are several.
    """
    template = hover(f"{of}, block %{{y}}, head %{{x}}: %{{z:.1f}} %" if of else "block %{y}, head %{x}: %{z:.1f} %")
    return figures.heat_map(rounded(100 * rectangle(alpha), 3), "%", limits=(0, 100), template=template)


def head_axis(alpha: Sequence[Sequence[float | None] | None]) -> dict[str, Any]:
    """The axis on which the heads of an `attention_map` are counted; every head is named where there is room."""
    width = max((len(heads) for heads in alpha if heads is not None), default=1)
    return axis("head (0-based)", dtick=max(1, math.ceil(width / 16)))


def _heads(result: SinksResult) -> Plot:
    n_heads = sum(len(heads) for heads in result.alpha if heads is not None)
    takeaway = f"{len(result.heads)} of {n_heads} heads are sinks in more than half of the sequences"
    if result.heads:
        head = result.heads[0]
        takeaway += f"; the strongest is head {head.head} of block {head.layer}, which gives it {head.alpha:.1%}"
        takeaway += " of its attention"
    return Plot(
        "sinks-heads",
        f"Attention that token {result.key} draws, block by head",
        f"{takeaway}.",
        f"Each square is one head: the share of its attention on key {result.key}, mean over the queries from there on "
        f"and over {result.n_sequences} sequences of T = {result.T} tokens. Brighter is more; above {result.epsilon:g} "
        "a head counts as a sink. An empty row is a block without softmax attention.",
        figures.figure(
            [attention_map(result.alpha)],
            head_axis(result.alpha),
            axis(BLOCK, autorange="reversed"),
            figures.height(len(result.alpha), 13, beside=120, least=360),
            _marked_row(result),
        ),
    )


def _rates(result: SinksResult) -> Plot:
    means = [None if heads is None else _mean(heads) for heads in result.alpha]
    data = [
        _curve("sink rate", result.rate_by_layer, VERMILLION, dash="solid"),
        _curve("mean attention drawn", means, BLUE, dash="dot"),
    ]
    for name, value, first, last in _spans(result):
        ends, level = (first - 0.4, last + 0.4), (100 * value, 100 * value)
        template = hover(f"{name}: %{{y:.1f}} %")
        data.append(figures.line(name, ends, level, stroke(GREY, dash="dash"), marker=None, template=template))
    highest, at = max((value, layer) for layer, value in enumerate(result.rate_by_layer) if value is not None)
    return Plot(
        "sinks-rate",
        f"Sinks on token {result.key} by block",
        f"{_before_and_after(result)}It is highest in block {at} ({highest:.1%}).",
        f"Sink rate: the share of a block's heads and sequences in which key {result.key} draws more than "
        f"{result.epsilon:g} of the attention. It falls with the length: compare only figures of the same T. A block "
        "reads what the blocks before it wrote, so the ME layer itself counts as before.",
        figures.figure(
            data,
            axis(BLOCK),
            axis("%", range=[0, 102]),
            figures.marked(result.me_layer, f"ME layer {result.me_layer}"),
        ),
    )


def _before_and_after(result: SinksResult) -> str:
    if result.me_layer is None:
        return "There is no ME layer to compare before and after. "
    if result.rate_until_me is None or result.rate_after_me is None:
        return ""
    return (
        f"The sink rate is {result.rate_until_me:.1%} up to the ME layer (block {result.me_layer}) and "
        f"{result.rate_after_me:.1%} after it. "
    )


def _spans(result: SinksResult) -> list[tuple[str, float, int, int]]:
    """The mean rates up to the ME layer and after it: name, rate, first and last block."""
    at, last = result.me_layer, len(result.alpha) - 1
    if at is None:
        return []
    spans = [("mean up to the ME layer", result.rate_until_me, 0, at), ("after it", result.rate_after_me, at + 1, last)]
    return [(name, value, first, end) for name, value, first, end in spans if value is not None]


def _massive(result: SinksResult) -> Plot:
    massive = result.massive
    assert massive is not None
    after = "" if massive.rate_after_me is None else f", {massive.rate_after_me:.1%} after the ME layer"
    return Plot(
        "sinks-massive",
        "Attention that the massive tokens draw, block by head",
        f"{massive.n_tokens} massive tokens, {massive.n_not_first} of them not the first of their sequence, are sinks "
        f"in {massive.rate:.1%} of all heads{after}.",
        "As above, with each massive token as the key, wherever it stands, and the queries from there on.",
        figures.figure(
            [attention_map(massive.alpha)],
            axis("head (0-based)"),
            axis(BLOCK, autorange="reversed"),
            figures.height(len(massive.alpha), 13, beside=120, least=360),
            _marked_row(result),
        ),
    )


def _strongest(result: SinksResult) -> Table:
    return Table(
        "The heads that are sinks in more than half of the sequences",
        ["block", "head", "attention drawn", "sink in"],
        [[head.layer, head.head, f"{head.alpha:.1%}", f"{head.share:.0%}"] for head in result.heads],
        takeaway=f"{number(len(result.heads))} heads, strongest first.",
        folded=True,
    )


def _marked_row(result: SinksResult) -> dict[str, Any]:
    """The line at the ME layer where blocks go down the page: under its row."""
    if result.me_layer is None:
        return figures.marked(None, "")
    return {"shapes": [figures.horizontal(result.me_layer + 0.5, stroke(ORANGE))]}


def _curve(name: str, shares: Sequence[float | None], colour: str, *, dash: str) -> Trace:
    percent = [None if value is None else 100 * value for value in shares]
    return figures.line(
        name,
        range(len(percent)),
        rounded(percent, 4),
        stroke(colour, dash=dash),
        marker=5 if dash == "solid" else 1,
        template=hover("block %{x}: %{y:.1f} %", name),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
