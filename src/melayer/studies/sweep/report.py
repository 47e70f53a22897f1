"""The report's section on what masks of every size do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from melayer.measurements.sinks.report import attention_map, head_axis
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, GREY, ORANGE, VERMILLION, Trace, axis, hover, stroke
from melayer.presentation.numbers import ABSENT, change, number, percent, rounded
from melayer.presentation.sections import Plot, Section, Table
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
_RATE = axis("rate: share of the dimensions masked")


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
        f"{result.change_shown(best)}) and highest with {worst.label} ({worst.perplexity:,.2f}, "
        f"{result.change_shown(worst)}).",
        f"How well the tokens of {result.n_sequences} sequences of T = {result.T} are predicted; lower is better, and "
        "the axis is logarithmic. The dashed line is the model without a mask, and the bars are the 95 % intervals of "
        "the difference from it, by sequence. Compare only figures of the same texts and T.",
        figures.figure(_perplexities(result), _RATE, axis("perplexity", type="log")),
    )


def _perplexities(result: SweepResult) -> list[Trace]:
    """A curve for each selector, with the ends of each difference from the plain model, which stands still."""
    *curves, plain = _by_rate(result, lambda point: point.perplexity, "%{y:.2f}")
    for curve, selector in zip(curves, _swept(result), strict=True):
        up: list[float | None] = [0.0]  # at rate 0 it is the plain model itself
        down: list[float | None] = [0.0]
        for point in result.masked:
            if point.selector == selector:
                ends = result.change_interval(point)
                low, high = (None, None) if ends is None else (result.plain.perplexity * (1 + end) for end in ends)
                up.append(None if high is None else high - point.perplexity)
                down.append(None if low is None else point.perplexity - low)
        if any(up):
            curve["error_y"] = figures.whiskers(rounded(up, 5), rounded(down, 5), thickness=1)
    return [*curves, plain]


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
        figures.figure(_by_rate(result, _sink_percent, "%{y:.1f} %"), _RATE, axis("%", range=[0, 102])),
    )


def _both(result: SweepResult) -> Plot:
    template = hover("%{text}: %{x:.1f} % sinks, perplexity %{y:.2f}")
    data = []
    for selector in _swept(result):
        points = [point for point in result.masked if point.selector == selector]
        sinks, perplexities = map(_sink_percent, points), [point.perplexity for point in points]
        curve = _curve(selector, list(sinks), perplexities, width=1, template=template)
        data.append(curve | {"text": [point.label for point in points]})
    plain = figures.points(
        rounded([_sink_percent(result.plain)], 5),
        rounded([result.plain.perplexity], 5),
        {"color": GREY, "size": 14, "symbol": "star"},
        template=hover("no mask: %{x:.1f} % sinks, perplexity %{y:.2f}"),
    )
    before = result.plain.sink_rate_after_me or 0.0
    fewer = [point for point in result.mild if (point.sink_rate_after_me or 0.0) < before]
    return Plot(
        "sweep-both",
        "What fewer sinks cost",
        f"{len(fewer)} of {len(result.masked)} masks have fewer sinks than the model without a mask at a perplexity at "
        "most 5 % above its own.",
        "Each point is a mask, joined by rate: further left key 0 is a sink in fewer heads after the ME layer, further "
        "down the texts are predicted better. The star is the model without a mask.",
        figures.figure(
            [*data, plain | {"name": "no mask"}],
            axis("sink rate after the ME layer, %"),
            axis("perplexity", type="log"),
        ),
    )


def _by_rate(result: SweepResult, value: Callable[[SweepPoint], float | None], shown: str) -> list[Trace]:
    """A curve for each selector, and a line at the model without a mask; `shown` says how a value is written."""
    data = []
    for selector in _swept(result):
        # Every curve starts at rate 0, which is the model without a mask whatever the selector.
        points = [result.plain, *(point for point in result.masked if point.selector == selector)]
        template = hover(f"{selector} %{{x:g}}: {shown}")
        data.append(_curve(selector, [point.rate for point in points], [value(point) for point in points], template))
    plain = figures.line(
        "no mask",
        [0, max(point.rate for point in result.masked)],
        rounded([value(result.plain)] * 2, 5),
        stroke(GREY, dash="dash"),
        marker=None,
        template=hover(f"no mask: {shown}"),
    )
    return [*data, plain]


def _heads(result: SweepResult) -> Plot:
    return Plot(
        "sweep-heads",
        "Attention that token 0 draws, block by head, with and without a mask",
        _heads_takeaway(result),
        "The menu chooses the mask; the colours mean the same for each. Each square is one head: the share of its "
        f"attention on key 0, mean over the queries and over {result.n_sequences} sequences of T = {result.T} tokens. "
        f"Brighter is more; above {result.epsilon:g} a head counts as a sink. An empty row is a block without softmax "
        "attention.",
        figures.figure(
            figures.first_shown([attention_map(point.alpha, of=point.label) for point in result.points]),
            head_axis(result.plain.alpha),
            axis(BLOCK, autorange="reversed"),
            figures.height(len(result.plain.alpha), 13, beside=160, least=400),
            {"shapes": [figures.horizontal(result.me_layer + 0.5, stroke(ORANGE))]},  # under its row
            figures.menu([point.label for point in result.points]),
        ),
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
    curves = [
        figures.line(
            point.label,
            range(len(point.cosine_next)),
            rounded(point.cosine_next, 6),
            stroke(GREY if point.selector is None else _COLOURS[point.selector]),
            template=hover(f"{point.label}, block %{{x}}: %{{y:.4f}}"),
        )
        for point in result.points
    ]
    return Plot(
        "sweep-cosine",
        "Direction of the massive token's state by block, with and without a mask",
        _cosines_takeaway(result),
        "The menu chooses the mask. Cosine of the massive token's state at a block's output with its own state one "
        "block later: 1 is the same direction, and a stretch of ones is where nothing about the token changes.",
        figures.figure(
            figures.first_shown(curves),
            axis(BLOCK),
            axis("cosine", range=_range(result)),
            {"showlegend": False},
            figures.marked(result.me_layer, f"ME layer {result.me_layer}"),
            figures.menu([point.label for point in result.points]),
        ),
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
    columns = ["mask", "perplexity", "95 % interval", "change", "95 % interval", "nats a token", "95 % interval"]
    columns += ["sinks", "after the ME layer", "cosine"]
    columns += ["rank read", "without", "rank of the stream", "without"]
    return Table(
        "The figures of every mask",
        columns,
        [
            [
                point.label,
                number(point.perplexity, 2),
                _ends(point.perplexity_low, point.perplexity_high, ",.2f"),
                *_difference(result, point),
                f"{point.sink_rate:.1%}",
                percent(point.sink_rate_after_me),
                number(point.cosine_rigid, 4),
                number(point.rank_attn_in, 1),
                number(point.rank_attn_in_without, 1),
                number(point.rank_block_out, 1),
                number(point.rank_block_out_without, 1),
            ]
            for point in result.points
        ],
        takeaway="Intervals are by sequence; those of the change, and of the nats that a mask adds to a token's "
        "log-loss, are paired with the plain model, and each stands alone: of twenty one leaves out 0 by chance. "
        "Cosine: mean from the ME layer until the state is erased. Effective ranks of what attention reads and of the "
        "residual stream: means over the blocks after the ME layer, with and without the massive tokens.",
        folded=True,
    )


def _difference(result: SweepResult, point: SweepPoint) -> list[str]:
    """The relative change and the difference in nats, each with its interval."""
    by = None if point.selector is None else result.difference(point)
    if point.selector is None:
        return [ABSENT] * 4
    if by is None:
        return [change(result.change(point)), *[ABSENT] * 3]
    low, high = result.change_interval(point) or (None, None)
    return [change(result.change(point)), _ends(low, high, "+.1%"), f"{by.value:+.4f}", _ends(by.low, by.high, "+.4f")]


def _ends(low: float | None, high: float | None, form: str) -> str:
    return ABSENT if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _curve(
    selector: str, x: Sequence[float | None], y: Sequence[float | None], template: str, *, width: int = 2
) -> Trace:
    style = stroke(_COLOURS[selector], width=width, dash=_DASHES.get(selector, "solid"))
    return figures.line(selector, rounded(x, 5), rounded(y, 5), style, marker=6, template=template)


def _swept(result: SweepResult) -> list[str]:
    return list(dict.fromkeys(point.selector for point in result.masked if point.selector is not None))


def _sink_percent(point: SweepPoint) -> float | None:
    return None if point.sink_rate_after_me is None else 100 * point.sink_rate_after_me
