"""The report's section on what masks of every size do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
from melayer.studies.sweep.result import SweepPoint, SweepResult

# One for each selector, from the same palette; the controls are dotted.
_COLOURS = {
    "weight": VERMILLION,
    "activation": BLUE,
    "random": ORANGE,
    "weight-low": VERMILLION,
    "activation-low": BLUE,
}
_DASHES = {"weight-low": "dot", "activation-low": "dot"}


def section(result: SweepResult) -> Section:
    """The curves by rate, the two against each other, and two plots that switch between plain and masked."""
    parts: list[Plot | Table] = []
    if result.masked:
        parts.append(_perplexity(result))
        if result.plain.sink_rate_after_me is not None:
            parts += [_sinks(result), _both(result)]
    parts += [_heads(result), _cosines(result), _figures(result)]
    return Section("sweep", "What masks of every size do", result.sentence, parts)


def _perplexity(result: SweepResult) -> Plot:
    best = min(result.masked, key=lambda point: point.perplexity)
    worst = max(result.masked, key=lambda point: point.perplexity)
    return Plot(
        "sweep-perplexity",
        "Perplexity by the share of masked dimensions",
        f"It is {result.plain.perplexity:,.2f} without a mask, lowest with {best.label} ({best.perplexity:,.2f}, "
        f"{result.change(best):+.1%}) and highest with {worst.label} ({worst.perplexity:,.2f}, "
        f"{result.change(worst):+.1%}).",
        f"How well the tokens of {result.n_sequences} sequences of T = {result.T} are predicted; lower is better, and "
        "the axis is logarithmic. The dashed line is the model without a mask. Compare only figures of the same texts "
        "and T.",
        _curves(result, lambda point: point.perplexity, "perplexity", "%{y:.2f}", {"type": "log"}),
    )


def _sinks(result: SweepResult) -> Plot:
    rates = [(p.sink_rate_after_me, p) for p in result.points if p.sink_rate_after_me is not None]
    (lowest, least), (highest, most) = (chosen(rates, key=lambda pair: pair[0]) for chosen in (min, max))
    return Plot(
        "sweep-sinks",
        "Sinks after the ME layer by the share of masked dimensions",
        f"The sink rate is {result.plain.sink_rate_after_me:.1%} without a mask; it is lowest with {least.label} "
        f"({lowest:.1%}) and highest with {most.label} ({highest:.1%}).",
        f"The share of heads and sequences in which key 0 draws more than {result.epsilon:g} of the attention, over "
        f"the blocks after block {result.me_layer}. The dashed line is the model without a mask.",
        _curves(result, _sink_percent, "%", "%{y:.1f} %", {"range": [0, 102]}),
    )


def _both(result: SweepResult) -> Plot:
    data = []
    for selector in _swept(result):
        points = [point for point in result.masked if point.selector == selector]
        data.append(
            {
                **_line(selector, map(_sink_percent, points), [point.perplexity for point in points], width=1),
                "text": [point.label for point in points],
                "hovertemplate": "%{text}: %{x:.1f} % sinks, perplexity %{y:.2f}<extra></extra>",
            }
        )
    plain = {
        "type": "scatter",
        "mode": "markers",
        "name": "no mask",
        "x": _plain([_sink_percent(result.plain)]),
        "y": _plain([result.plain.perplexity]),
        "marker": {"color": GREY, "size": 14, "symbol": "star"},
        "hovertemplate": "no mask: %{x:.1f} % sinks, perplexity %{y:.2f}<extra></extra>",
    }
    before = result.plain.sink_rate_after_me or 0.0
    fewer = [point for point in result.mild if (point.sink_rate_after_me or 0.0) < before]
    return Plot(
        "sweep-both",
        "What fewer sinks cost",
        f"{len(fewer)} of {len(result.masked)} masks have fewer sinks than the model without a mask at a perplexity at "
        "most 5 % above its own.",
        "Each point is a mask, joined by rate: further left key 0 is a sink in fewer heads after the ME layer, further "
        "down the texts are predicted better. The star is the model without a mask.",
        {
            "data": [*data, plain],
            "layout": {
                "xaxis": {"title": {"text": "sink rate after the ME layer, %"}},
                "yaxis": {"title": {"text": "perplexity"}, "type": "log"},
            },
        },
    )


def _curves(
    result: SweepResult, value: Callable[[SweepPoint], float | None], title: str, shown: str, axis: dict[str, Any]
) -> dict[str, Any]:
    data = []
    for selector in _swept(result):
        # Every curve starts at rate 0, which is the model without a mask whatever the selector.
        points = [result.plain, *(point for point in result.masked if point.selector == selector)]
        line = _line(selector, [point.rate for point in points], [value(point) for point in points])
        data.append(line | {"hovertemplate": f"{selector} %{{x:g}}: {shown}<extra></extra>"})
    plain = {
        "type": "scatter",
        "mode": "lines",
        "name": "no mask",
        "x": [0, max(point.rate for point in result.masked)],
        "y": _plain([value(result.plain)] * 2),
        "line": {"color": GREY, "width": 2, "dash": "dash"},
        "hovertemplate": f"no mask: {shown}<extra></extra>",
    }
    return {
        "data": [*data, plain],
        "layout": {
            "xaxis": {"title": {"text": "rate: share of the dimensions masked"}},
            "yaxis": {"title": {"text": title}, **axis},
        },
    }


def _heads(result: SweepResult) -> Plot:
    traces = []
    width = max((len(values) for values in result.plain.alpha if values is not None), default=0)
    for point in result.points:
        grid = np.full((len(point.alpha), width), math.nan)
        for layer, values in enumerate(point.alpha):
            if values is not None:
                grid[layer, : len(values)] = [math.nan if value is None else value for value in values]
        traces.append(
            {
                "type": "heatmap",
                "z": rounded(100 * grid, 3),
                "zmin": 0,
                "zmax": 100,
                "colorscale": SEQUENTIAL,
                "colorbar": {"title": {"text": "%"}, "thickness": 12},
                "hovertemplate": f"{point.label}, block %{{y}}, head %{{x}}: %{{z:.1f}} %<extra></extra>",
            }
        )
    return Plot(
        "sweep-heads",
        "Attention that token 0 draws, block by head, with and without a mask",
        _heads_takeaway(result),
        "The menu chooses the mask; the colours mean the same for each. Each square is one head: the share of its "
        f"attention on key 0, mean over the queries and over {result.n_sequences} sequences of T = {result.T} tokens. "
        f"Brighter is more; above {result.epsilon:g} a head counts as a sink. An empty row is a block without softmax "
        "attention.",
        {
            "data": _first_shown(traces),
            "layout": {
                "xaxis": {"title": {"text": "head (0-based)"}, "dtick": max(1, math.ceil(width / 16))},
                "yaxis": {"title": {"text": "block (0-based)"}, "autorange": "reversed"},
                "height": max(400, 160 + 13 * len(result.plain.alpha)),
                "shapes": [_me_line(result.me_layer + 0.5, along="y")],  # under its row
                **_menu(result),
            },
        },
    )


def _heads_takeaway(result: SweepResult) -> str:
    drawn = [(value, point) for point in result.points if (value := _drawn_after(point, result.me_layer)) is not None]
    if not drawn:
        return "No block after the ME layer has softmax attention."
    text = f"After the ME layer token 0 draws {drawn[0][0]:.1%} of the attention without a mask"
    if len(drawn) == 1:
        return f"{text}."
    least, point = min(drawn[1:], key=lambda pair: pair[0])
    return f"{text}, and of all masks least with {point.label} ({least:.1%})."


def _drawn_after(point: SweepPoint, me_layer: int) -> float | None:
    after = [value for values in point.alpha[me_layer + 1 :] for value in values or () if value is not None]
    return float(np.mean(after)) if after else None


def _cosines(result: SweepResult) -> Plot:
    traces = []
    for point in result.points:
        colour = GREY if point.selector is None else _COLOURS[point.selector]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": point.label,
                "x": list(range(len(point.cosine_next))),
                "y": _plain(point.cosine_next, 6),
                "line": {"color": colour, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": f"{point.label}, block %{{x}}: %{{y:.4f}}<extra></extra>",
            }
        )
    at = result.me_layer
    text = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": f"ME layer {at}", "showarrow": False}
    return Plot(
        "sweep-cosine",
        "Direction of the massive token's state by block, with and without a mask",
        _cosines_takeaway(result),
        "The menu chooses the mask. Cosine of the massive token's state at a block's output with its own state one "
        "block later: 1 is the same direction, and a stretch of ones is where nothing about the token changes.",
        {
            "data": _first_shown(traces),
            "layout": {
                "xaxis": {"title": {"text": "block (0-based)"}},
                "yaxis": {"title": {"text": "cosine"}, "range": _range(result)},
                "showlegend": False,
                "shapes": [_me_line(at, along="x")],
                "annotations": [text | {"font": {"color": ORANGE}}],
                **_menu(result),
            },
        },
    )


def _cosines_takeaway(result: SweepResult) -> str:
    known = [(point.cosine_rigid, point) for point in result.masked if point.cosine_rigid is not None]
    plain = result.plain.cosine_rigid
    if plain is None:
        return "No two neighbouring blocks after the ME layer could be compared."
    text = f"From the ME layer until the state is erased the mean cosine is {plain:.4f} without a mask"
    if not known:
        return f"{text}."
    lowest, point = min(known, key=lambda pair: pair[0])
    return f"{text} and at least {math.floor(lowest * 1e4) / 1e4:.4f} with one ({point.label})."


def _range(result: SweepResult) -> list[float]:
    """One for all masks, so that switching moves nothing but the line."""
    known = [value for point in result.points for value in point.cosine_next if value is not None]
    return [min([0.9, *known]) - 0.02, 1.02]


def _figures(result: SweepResult) -> Table:
    columns = ["mask", "perplexity", "change", "sinks", "after the ME layer", "cosine"]
    columns += ["rank read", "without", "rank of the stream", "without"]
    return Table(
        "The figures of every mask",
        columns,
        [
            [
                point.label,
                number(point.perplexity, 2),
                "—" if point.selector is None else f"{result.change(point):+.1%}",
                f"{point.sink_rate:.1%}",
                "—" if point.sink_rate_after_me is None else f"{point.sink_rate_after_me:.1%}",
                number(point.cosine_rigid, 4),
                number(point.rank_attn_in, 1),
                number(point.rank_attn_in_without, 1),
                number(point.rank_block_out, 1),
                number(point.rank_block_out_without, 1),
            ]
            for point in result.points
        ],
        takeaway="Cosine: mean from the ME layer until the state is erased. Effective ranks of what attention reads "
        "and of the residual stream: means over the blocks after the ME layer, with and without the massive tokens.",
        folded=True,
    )


def _menu(result: SweepResult) -> dict[str, Any]:
    """A menu that shows one trace of as many as there are points."""
    n = len(result.points)
    buttons = [
        {"label": point.label, "method": "restyle", "args": [{"visible": [other == place for other in range(n)]}]}
        for place, point in enumerate(result.points)
    ]
    menu = {"type": "dropdown", "buttons": buttons, "active": 0, "x": 0, "xanchor": "left"}
    return {"updatemenus": [menu | {"y": 1.06, "yanchor": "bottom"}]}


def _first_shown(traces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**trace, "visible": place == 0} for place, trace in enumerate(traces)]


def _me_line(at: float, *, along: str) -> dict[str, Any]:
    across = "y" if along == "x" else "x"
    ends = {f"{along}0": at, f"{along}1": at, f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
    return {"type": "line", **ends, "line": {"color": ORANGE, "width": 2}}


def _line(name: str, x: Any, y: Sequence[float | None], *, width: int = 2) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": _plain(list(x)),
        "y": _plain(y),
        "line": {"color": _COLOURS[name], "width": width, "dash": _DASHES.get(name, "solid")},
        "marker": {"size": 6},
    }


def _swept(result: SweepResult) -> list[str]:
    return list(dict.fromkeys(point.selector for point in result.masked if point.selector is not None))


def _sink_percent(point: SweepPoint) -> float | None:
    return None if point.sink_rate_after_me is None else 100 * point.sink_rate_after_me


def _plain(values: Sequence[float | None], digits: int = 5) -> list[Any]:
    return rounded(np.array([math.nan if value is None else value for value in values]), digits)
