"""The report's section on what attention does with the massive activation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from melayer.measurements.sinks.result import SinksResult
from melayer.presentation.sections import (
    BLUE,
    GREY,
    ORANGE,
    SEQUENTIAL,
    VERMILLION,
    Plot,
    Section,
    Table,
    number,
    rounded,
)


def section(result: SinksResult) -> Section:
    """Plots of a sinks result, and the heads; what massive tokens draw elsewhere only where some stand elsewhere."""
    parts: list[Plot | Table] = [_heads(result), _rates(result)]
    if result.massive is not None and result.massive.n_not_first:
        parts.append(_massive(result))
    parts.append(_strongest(result))
    return Section("sinks", "What attention does with it", result.sentence, parts)


def _heads(result: SinksResult) -> Plot:
    n_sinks = len(result.heads)
    known = [values for values in result.alpha if values is not None]
    n_heads = sum(map(len, known))
    takeaway = f"{n_sinks} of {n_heads} heads are sinks in more than half of the sequences"
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
        {
            "data": [_heat(result, result.alpha)],
            "layout": {
                "xaxis": {"title": {"text": "head (0-based)"}, "dtick": _step(max(map(len, known), default=1))},
                "yaxis": {"title": {"text": "block (0-based)"}, "autorange": "reversed"},
                "height": max(360, 120 + 13 * len(result.alpha)),
                **_marked(result, horizontal=True),
            },
        },
    )


def _heat(result: SinksResult, alpha: Any) -> dict[str, Any]:
    width = max((len(values) for values in alpha if values is not None), default=0)
    grid = np.full((len(alpha), width), math.nan)
    for layer, values in enumerate(alpha):
        if values is not None:
            grid[layer, : len(values)] = [math.nan if value is None else value for value in values]
    return {
        "type": "heatmap",
        "z": rounded(100 * grid, 3),
        "zmin": 0,
        "zmax": 100,
        "colorscale": SEQUENTIAL,
        "colorbar": {"title": {"text": "%"}, "thickness": 12},
        "hovertemplate": "block %{y}, head %{x}: %{z:.1f} %<extra></extra>",
    }


def _rates(result: SinksResult) -> Plot:
    data = [_line("sink rate", result.rate_by_layer, VERMILLION)]
    means = [None if values is None else _mean(values) for values in result.alpha]
    data.append(_line("mean attention drawn", means, BLUE, dash="dot"))
    for name, value, first, last in _spans(result):
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [first - 0.4, last + 0.4],
                "y": [100 * value, 100 * value],
                "line": {"color": GREY, "width": 2, "dash": "dash"},
                "hovertemplate": f"{name}: %{{y:.1f}} %<extra></extra>",
            }
        )
    rates = [(value, layer) for layer, value in enumerate(result.rate_by_layer) if value is not None]
    highest, at = max(rates)
    return Plot(
        "sinks-rate",
        f"Sinks on token {result.key} by block",
        f"{_before_and_after(result)}It is highest in block {at} ({highest:.1%}).",
        f"Sink rate: the share of a block's heads and sequences in which key {result.key} draws more than "
        f"{result.epsilon:g} of the attention. It falls with the length: compare only figures of the same T. A block "
        "reads what the blocks before it wrote, so the ME layer itself counts as before.",
        {
            "data": data,
            "layout": {
                "xaxis": {"title": {"text": "block (0-based)"}},
                "yaxis": {"title": {"text": "%"}, "range": [0, 102]},
                **_marked(result),
            },
        },
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
        {
            "data": [_heat(result, massive.alpha)],
            "layout": {
                "xaxis": {"title": {"text": "head (0-based)"}},
                "yaxis": {"title": {"text": "block (0-based)"}, "autorange": "reversed"},
                "height": max(360, 120 + 13 * len(massive.alpha)),
                **_marked(result, horizontal=True),
            },
        },
    )


def _strongest(result: SinksResult) -> Table:
    return Table(
        "The heads that are sinks in more than half of the sequences",
        ["block", "head", "attention drawn", "sink in"],
        [[head.layer, head.head, f"{head.alpha:.1%}", f"{head.share:.0%}"] for head in result.heads],
        takeaway=f"{number(len(result.heads))} heads, strongest first.",
        folded=True,
    )


def _marked(result: SinksResult, *, horizontal: bool = False) -> dict[str, Any]:
    """The line at the ME layer; under its row where blocks go down the page."""
    at = result.me_layer
    if at is None:
        return {"shapes": [], "annotations": []}
    along, across = ("y", "x") if horizontal else ("x", "y")
    place = at + 0.5 if horizontal else at
    line: dict[str, Any] = {
        "type": "line",
        f"{along}0": place,
        f"{along}1": place,
        f"{across}ref": "paper",
        f"{across}0": 0,
    }
    line |= {f"{across}1": 1, "line": {"color": ORANGE, "width": 2}}
    if horizontal:
        return {"shapes": [line]}
    text = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": f"ME layer {at}", "showarrow": False}
    return {"shapes": [line], "annotations": [text | {"font": {"color": ORANGE}}]}


def _line(name: str, values: Any, colour: str, *, dash: str = "solid") -> dict[str, Any]:
    percent = [math.nan if value is None else 100 * value for value in values]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(range(len(percent))),
        "y": rounded(np.array(percent), 4),
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 5 if dash == "solid" else 1},
        "hovertemplate": "block %{x}: %{y:.1f} %<extra>" + name + "</extra>",
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _step(width: int) -> int:
    """Every head named where there is room."""
    return max(1, math.ceil(width / 16))
