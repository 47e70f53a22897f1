"""The report's section on where the massive activation is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from melayer.data.rows import visible
from melayer.measurements.locate.figures import FirstTokens, Trace
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.locate.words import STARTS, growth, kind
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, GREY, ORANGE, VERMILLION, axis, hover, label, stroke
from melayer.presentation.numbers import number, percent, rounded
from melayer.presentation.sections import Plot, Section, Table

TITLE = "Where it is"

# More columns than this cannot be told apart in the 3-D picture, and each costs bytes.
_SURFACE_COLUMNS = 768
_LISTED = 400


def section(result: LocateResult) -> Section:
    """Plots and tables of a locate result."""
    parts: list[Plot | Table] = [_magnitudes(result)]
    if result.shares:
        parts.append(_shares(result))
    if result.trace is not None:
        parts += [_tokens(result, result.trace), _surface(result, result.trace)]
    parts += [_stages(result), *_massive(result), _sequences(result)]
    if result.first_tokens is not None and len(result.first_tokens.rows) > 1:
        parts.append(_first_tokens(result.first_tokens))
    parts.append(_blocks(result))
    return Section("locate", TITLE, result.sentence, parts)


def _magnitudes(result: LocateResult) -> Plot:
    blocks, criterion = result.blocks, result.criterion
    layers = [row.layer for row in blocks]
    threshold = [
        None if row.median_abs is None else max(criterion.min_abs, criterion.min_ratio * row.median_abs)
        for row in blocks
    ]
    largest = figures.line(
        "largest |h|",
        layers,
        rounded([row.max_abs for row in blocks], 6),
        stroke(BLUE, dash="solid"),
        template=hover("%{text}<br>|h| = %{y:,.4~g}"),
    )
    where = [
        f"block {row.layer}<br>token {row.token_index} “{label(visible(row.token))}”, dimension {row.dim}"
        f"<br>text {row.sequence}"
        for row in blocks
    ]
    median = rounded([row.median_abs for row in blocks], 6)
    data = [
        largest | {"text": where},
        figures.line("median |h|", layers, median, stroke(GREY, dash="solid")),
        figures.line("criterion", layers, rounded(threshold, 6), stroke(VERMILLION, dash="dash"), marker=1),
    ]
    return Plot(
        "magnitudes",
        "Largest magnitude by block",
        _magnitudes_takeaway(result),
        "Each point is the largest |h| over all texts, tokens and dimensions at that block's output; the vertical axis "
        "is logarithmic, without unit. A block counts as massive where the blue line is above the dashed one "
        f"(larger than {criterion.min_abs:,.0f} and than {criterion.min_ratio:,.0f} times the median).",
        figures.figure(
            data,
            axis(BLOCK),
            axis("|h| at the block's output", type="log", exponentformat="power"),
            figures.marked(result.me_layer, f"ME layer {result.me_layer}"),
        ),
    )


def _magnitudes_takeaway(result: LocateResult) -> str:
    at = result.me_layer
    if at is None:
        return result.sentence
    above = sum(row.n_holding > 0 for row in result.blocks)
    return (
        f"After block {at} the largest value is {_ratio_to_before(result)} the one before it; "
        f"the criterion holds after {above} of {len(result.blocks)} blocks in at least one text."
    )


def _ratio_to_before(result: LocateResult) -> str:
    at = result.me_layer
    assert at is not None
    before = result.embedding_max_abs if at == 0 else result.blocks[at - 1].max_abs
    now = result.blocks[at].max_abs
    return f"{now / before:,.0f} times" if now and before else "not comparable with"


def _shares(result: LocateResult) -> Plot:
    layers = [stage.layer for stage in result.shares]
    split = [(stage.attn_share or 0.0, stage.ffn_share or 0.0) for stage in result.shares]
    rest = [stage.share - attn - ffn for stage, (attn, ffn) in zip(result.shares, split, strict=True)]
    written = {"FFN": ([ffn for _, ffn in split], ORANGE), "attention": ([attn for attn, _ in split], BLUE)}
    if any(stage.attn_share is None for stage in result.shares):
        written["other mixer"] = (rest, GREY)
    data = [
        figures.bar(layers, rounded(shares), colour, name=name, template=hover("block %{x}: %{y:.2%}", name))
        for name, (shares, colour) in written.items()
    ]
    return Plot(
        "shares",
        "Who writes the massive state",
        _shares_takeaway(result),
        "The part of the massive token's peak state that each block adds along its direction, split into what "
        "attention and FFN write; bars below zero take it away. Up to the peak, all bars and the embedding add up to "
        "100 %.",
        figures.figure(data, axis(BLOCK), axis("share of the peak state", tickformat=".0%"), {"barmode": "relative"}),
    )


def _shares_takeaway(result: LocateResult) -> str:
    largest = max(result.shares, key=lambda stage: stage.share)
    erased = min(result.shares, key=lambda stage: stage.share)
    takeaway = f"Block {largest.layer} writes {percent(largest.share)} of the peak state"
    if largest.ffn_share is not None:
        takeaway += f" ({percent(largest.ffn_share)} by its FFN)"
    if result.me_layer is not None and largest.layer != result.me_layer:
        takeaway += f", block {result.me_layer} (the ME layer) {percent(result.shares[result.me_layer].share)}"
    removed = percent(-erased.share)
    takeaway += f"; the largest removal is {removed}, at block {erased.layer}" if erased.share < 0 else ""
    return f"{takeaway}."


def _tokens(result: LocateResult, trace: Trace) -> Plot:
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.log10(np.maximum(trace.token_max, 1e-12))
    names = [f"{place} {label(visible(token))}" for place, token in enumerate(trace.tokens)]
    finite = np.where(np.isfinite(trace.token_max), trace.token_max, 0.0)
    layer, token = np.unravel_index(int(finite.argmax()), finite.shape)
    others = np.delete(finite[layer], token)
    against = f", {finite[layer, token] / others.max():,.0f} times the largest other token" if others.any() else ""
    n_tokens = result.sequences[trace.sequence].n_tokens
    first = f", of its first {len(trace.tokens)} tokens," if n_tokens > len(trace.tokens) else ""
    tokens = axis("token", autorange="reversed", type="category", dtick=1, tickfont={"size": 11}, automargin=True)
    squares = figures.heat_map(
        rounded(magnitude.T, 3),
        "log₁₀ |h|",
        x=list(range(len(magnitude))),
        y=names,
        template=hover("block %{x}, token %{y}<br>|h| = 10^%{z:.2f}"),
    )
    return Plot(
        "tokens",
        "Tokens by blocks",
        f"In text {trace.sequence}{first} token {token} (“{visible(trace.tokens[token])}”) holds the largest value, "
        f"{finite[layer, token]:,.0f} at block {layer}{against}.",
        f"Each cell is the largest |h| over the dimensions of one token at one block's output, as a power of ten; "
        f"the first {len(trace.tokens)} tokens of one text. A massive token is a bright row.",
        figures.figure([squares], axis(BLOCK), tokens, figures.height(len(names), 15, beside=90, least=280)),
    )


def _surface(result: LocateResult, trace: Trace) -> Plot:
    magnitude = np.where(np.isfinite(trace.states), np.abs(trace.states), 0.0)
    d_model = magnitude.shape[1]
    width = -(-d_model // _SURFACE_COLUMNS)
    starts = np.arange(0, d_model, width)
    binned = np.maximum.reduceat(magnitude, starts, axis=1)
    peak_layer, peak_dim = np.unravel_index(int(magnitude.argmax()), magnitude.shape)
    squares = magnitude[peak_layer].astype(np.float64) ** 2  # which float32 might not hold
    share = squares[peak_dim] / max(float(squares.sum()), 1e-30)
    grouping = f" Each column is the maximum of {width} neighbouring dimensions." if width > 1 else ""
    landscape = figures.surface(
        starts.tolist(),
        list(range(len(binned))),
        rounded(binned, 3),
        template=hover("dimension %{x}, block %{y}<br>|h| = %{z:,.4~g}"),
    )
    return Plot(
        "surface",
        "The massive token in three dimensions",
        f"At its peak, after block {peak_layer}, dimension {peak_dim} of token {trace.token_index} "
        f"(“{visible(trace.token)}”) alone holds {share:.1%} of its squared norm.",
        "The |h| of one token: dimensions by blocks by magnitude. Drag to turn, scroll to zoom; the buttons switch "
        f"the vertical axis between linear and logarithmic.{grouping}",
        figures.scene([landscape], axis("dimension"), axis(BLOCK), axis("|h|", type="linear")),
    )


def _stages(result: LocateResult) -> Table:
    def row(kind: str, layer: int) -> list[Any]:
        stage, block = result.shares[layer], result.blocks[layer]
        shares = map(percent, (stage.share, stage.attn_share, stage.ffn_share))
        return [kind, layer, *shares, number(block.max_abs), number(block.ratio)]

    return Table(
        "Stages",
        ["", "block", "share", "by attention", "by FFN", "largest |h|", "ratio to median"],
        [row("adds", stage.layer) for stage in result.stages] + [row("erases", layer) for layer in result.erased_at],
        takeaway=f"Emergence: {kind(result)}{'; ' + growth(result) if result.shares else ''}.",
    )


def _massive(result: LocateResult) -> list[Table]:
    columns = ["block", "text", "token", "", "dimension", "value"]
    rows = [[s.layer, s.sequence, s.token_index, visible(s.token), s.dim, number(s.value, 1)] for s in result.massive]
    if not rows:
        return [Table("Massive scalars", columns, [], takeaway="No scalar meets the criterion.")]
    total = result.n_massive
    dims = sorted({row.dim for row in result.massive_dims})
    takeaway = (
        f"{total:,} scalars meet the criterion over all texts and blocks, in {len(dims)} "
        f"dimension{'s' if len(dims) != 1 else ''} ({', '.join(map(str, dims[:8]))}{'…' if len(dims) > 8 else ''})."
    )
    at = result.me_layer
    if at is None:
        return [Table(f"Massive scalars{_cut(rows, total)}", columns, rows[:_LISTED], takeaway=takeaway)]
    first = [row for row in rows if row[0] == at]
    here = f"Massive scalars at the ME layer{_cut(first, result.blocks[at].n_massive)}"
    whole = f"Massive scalars at every block{_cut(rows, total)}"
    return [
        Table(here, columns, first[:_LISTED], takeaway=takeaway),
        Table(whole, columns, rows[:_LISTED], folded=True),
    ]


def _cut(rows: Sequence[object], total: int) -> str:
    """How many of all are shown, where it is not all of them."""
    shown = min(len(rows), _LISTED)
    return f", {shown:,} of {total:,}" if shown < total else ""


def _sequences(result: LocateResult) -> Table:
    holding = sum(bool(row.holds) for row in result.sequences)
    takeaway = f"The criterion holds at the ME layer in {holding} of {len(result.sequences)} texts."
    return Table(
        "Texts",
        ["", "text", "tokens", "first token", "votes", "holds", "massive token", "emergence"],
        [
            [
                row.index,
                visible(row.text),
                row.n_tokens,
                visible(row.first_token),
                "yes" if row.votes else "too short",
                {True: "yes", False: "no", None: "—"}[row.holds],
                "—" if row.massive_token is None else f"{row.massive_token_index}: {visible(row.massive_token)}",
                row.emergence or "—",
            ]
            for row in result.sequences
        ],
        takeaway=takeaway if result.me_layer is not None else "",
    )


def _first_tokens(found: FirstTokens) -> Table:
    n = found.n_sequences
    takeaway = (
        "Something else is found with another first token."
        if found.differing
        else "The same block is found with each, and the first token is massive with all of them or with none."
    )
    return Table(
        "With another first token",
        [
            *("first token", "", "ME layer", "texts holding", "texts with the first token massive"),
            *("largest |h|", "block", "token", "", "dimension"),
        ],
        [
            [
                "—" if row.token is None else visible(row.token),
                ", ".join(STARTS[kind] for kind in row.kinds),
                "—" if row.me_layer is None else row.me_layer,
                f"{row.n_holding} of {n}",
                f"{row.n_first_massive} of {n}",
                number(row.max_abs, 1),
                row.layer,
                row.massive_token_index,
                visible(row.massive_token),
                row.dim,
            ]
            for row in found.rows
        ],
        takeaway=f"{takeaway} In {n} texts of up to {found.max_tokens} tokens.",
    )


def _blocks(result: LocateResult) -> Table:
    return Table(
        "Every block",
        [
            "block",
            "largest |h|",
            "text",
            "token",
            "",
            "dimension",
            "median |h|",
            "ratio",
            "norm of that token",
            "median norm of the others",
            "massive scalars",
            "texts holding",
        ],
        [
            [
                row.layer,
                number(row.max_abs, 1),
                row.sequence,
                row.token_index,
                visible(row.token),
                row.dim,
                number(row.median_abs, 3),
                number(row.ratio),
                number(row.top_norm),
                number(row.others_norm, 1),
                row.n_massive,
                row.n_holding,
            ]
            for row in result.blocks
        ],
        folded=True,
    )
