"""The report's section on a scan: census, histograms, overflow, what rounding loses, massive tokens, growth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from melayer.census.rounding_error import KINDS, LINEAR_INPUTS
from melayer.data.rows import visible
from melayer.model.provenance import versions
from melayer.numerics import histogram
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, GREY, ORANGE, VERMILLION, Trace, axis, hover, stroke
from melayer.presentation.numbers import ABSENT, number, rounded
from melayer.presentation.page import Page, Written, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table

if TYPE_CHECKING:
    from melayer.census.result import Part, PlaceRow, ScanResult


FP16_MAX = 65504
_PERCENT = {"tickvals": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], "tickformat": ".1%"}
_PALETTE = (BLUE, VERMILLION, ORANGE, GREY)
_KIND_COLOURS = {"tensor": VERMILLION, "tensor without massive": BLUE, "token": GREY}
"""What shares a scale, in the order in which it is drawn."""


def write_scan_report(result: ScanResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes a scan's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `scan` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    model, settings, total = result.model, result.settings, result.total
    data = settings["data"]
    size = f", {data['bytes']:,} bytes" if "bytes" in data else f", split {data['split']}"
    size += f" in {data['files']:,} files" if "files" in data else ""
    facts = [
        ("Model", f"{model.name} ({model.family}, {model.n_layers} blocks, d_model {model.d_model}), {model.dtype}"),
        ("Fingerprint of the weights", model.fingerprint),
        ("Corpus", f"{data['source']}{size}: {total.documents:,} documents, {total.tokens:,} tokens"),
        ("Sequences", f"{total.sequences:,} of at most {settings['max_tokens']} tokens"),
        ("Mask", settings["mask"] or "none"),
        ("Time", f"{result.seconds:,.0f} s in {result.n_processes} process{'es' * (result.n_processes > 1)}"),
        ("Counting", "blocks, tokens, dimensions and documents from 0"),
        versions_fact(versions()),
    ]
    page = Page(model.name, [section(result)], result.notes, facts, {"scan": result.to_dict()})
    return write_page(page, out, command=command)


def section(result: ScanResult) -> Section:
    """The plots and tables of all documents, then a table for each category."""
    total = result.total
    parts: list[Plot | Table] = [_bars(total), _map(total)]
    histograms = _histograms(total)
    parts += [histograms] if histograms is not None else []
    parts += [_overflow(total)]
    if total.losses:
        parts += [_losses(result), _loss_table(result)]
    parts += [_tokens(total), _growth(total)]
    parts += [_sites(part, f"Category {part.name or '(empty)'}") for part in result.categories]
    parts.append(_sites(total, "Every site at its largest", folded=True))
    return Section("scan", "How large activations get", result.sentence, parts)


def _bars(part: Part) -> Plot:
    rows = [row for row in part.by_site() if row.max_abs is not None]
    maxima = [row.max_abs or 0.0 for row in rows]
    down = [top - row.interval[0] if row.interval else 0.0 for top, row in zip(maxima, rows, strict=True)]
    names = [row.site if row.layer is None else f"{row.site} {row.layer}" for row in rows]
    bars = figures.bar(names, rounded(maxima, 6), BLUE, template=hover("%{x}: %{y:,.4g}"))
    bars["error_y"] = figures.whiskers([0] * len(rows), rounded(down, 4))
    fp16 = figures.horizontal(FP16_MAX, stroke(VERMILLION, dash="dash", width=1.5))
    largest = max(rows, key=lambda row: row.max_abs or 0.0)
    factor = (largest.max_abs or 0.0) / (largest.quantiles["0.9999"] or math.nan)
    takeaway = f"The largest is in {largest.site}" + ("." if largest.layer is None else f" of block {largest.layer}.")
    if math.isfinite(factor):
        takeaway += f" It is {factor:,.0f} times what 99.99 % of the values there stay under."
    return Plot(
        "scan-census",
        "The largest activation of each site",
        takeaway,
        "Over all documents and blocks. The thin bar reaches down to the lower end of a 95 % bootstrap interval over "
        "documents: how much of the maximum rests on few of them. A bootstrap cannot say how far it may rise beyond "
        "what was seen. The line is float16's largest number.",
        figures.figure(
            [bars],
            axis("site, with the block that holds its largest value", automargin=True),
            axis("max |x| (log scale)", type="log"),
            {"shapes": [fp16] if max(maxima, default=0.0) > FP16_MAX / 100 else []},
        ),
    )


def _map(part: Part) -> Plot:
    rows = [row for row in part.places if row.layer is not None]
    sites = [row.site for row in part.by_site() if row.layer is not None]
    layers = sorted({row.layer for row in rows if row.layer is not None})
    by_place = {(row.site, row.layer): row.max_abs for row in rows}
    values = np.array([[by_place.get((site, layer)) or math.nan for layer in layers] for site in sites], dtype=float)
    squares = figures.heat_map(
        rounded(_log10(values), 4),
        "log10 max |x|",
        x=layers,
        y=sites,
        thickness=None,
        template=hover("%{y} of block %{x}: max |x| %{text}"),
    )
    return Plot(
        "scan-map",
        "Where activations are large",
        "There is no ME layer." if part.me_layer is None else f"The ME layer is block {part.me_layer}.",
        "The largest |x| of each site of each block over all documents, as a power of ten: 3 is a thousand, 4.8 is "
        "where float16 ends. The ME layer is the first block at whose output the criterion holds in a majority of the "
        "sequences and goes on holding.",
        figures.figure(
            [squares | {"text": rounded(values, 4)}], axis(BLOCK), axis(autorange="reversed", automargin=True)
        ),
    )


def _log10(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where a value is not above 0."""
    logs = np.full_like(values, math.nan)
    np.log10(values, out=logs, where=values > 0)
    return logs


def _histograms(part: Part) -> Plot | None:
    layers, octaves, shares = _octave_shares(part)
    if not layers:
        return None
    row = max((row for row in part.places if row.site == "block_out"), key=lambda row: row.max_abs or math.inf)
    takeaway = f"After block {row.layer} half of the values are below {number(row.quantiles['0.5'], 3)}"
    takeaway += "." if row.max_abs is None else f" and the largest is {row.max_abs:,.1f}."
    squares = figures.heat_map(
        rounded(_log10(shares), 4),
        "log10 of the share",
        x=[float(2.0**octave) for octave in octaves],
        y=layers,
        thickness=None,
        template=hover("block %{y}, |x| from %{x:.3g} to twice that: 10^%{z:.2f}"),
    )
    return Plot(
        "scan-histogram",
        "How the residual stream is distributed",
        takeaway,
        "Each row is one block's output: the share of its values in each doubling of |x|, as a power of ten (−2 is one "
        "in a hundred). A patch far to the right of the rest is a massive activation.",
        figures.figure([squares], axis("|x| (log scale)", type="log"), axis(BLOCK)),
    )


def _octave_shares(part: Part) -> tuple[list[int | None], NDArray[np.int64], NDArray[np.float64]]:
    """The histograms of the blocks' outputs with a column for each doubling: its 64 bins are finer than a screen.

    Returns:
        The blocks; the power of two at which each column begins, from the first to the last that has a value; the
        share of each block's values in each of them, [blocks, columns].
    """
    census = part.census
    assert census is not None
    at = [(place.layer, row) for row, place in enumerate(census.places) if place.site == "block_out"]
    begins = np.floor(np.log2(np.maximum(histogram.edges()[:-1], 2.0**-25))).astype(int)
    octaves = np.arange(begins.min(), begins.max() + 1)
    shares = np.zeros((len(at), len(octaves)))
    for line, (_, row) in enumerate(at):
        np.add.at(shares[line], begins - octaves[0], census.counts[row] / max(census.counts[row].sum(), 1))
    used = np.flatnonzero(shares.any(axis=0))
    columns = slice(used[0], used[-1] + 1) if len(used) else slice(0)
    return [layer for layer, _ in at], octaves[columns], shares[:, columns]


def _overflow(part: Part) -> Table:
    rows = []
    for row in part.by_site():
        of_site = [other for other in part.places if other.site == row.site]
        beyond, values = sum(other.beyond_fp16 for other in of_site), sum(other.n_values for other in of_site)
        headroom = ABSENT if not row.max_abs else f"{FP16_MAX / row.max_abs:,.1f}×"
        rows.append([row.site, number(row.max_abs, 1), headroom, f"{beyond:,}", f"{beyond / values:.2g}"])
    total = sum(row.beyond_fp16 for row in part.places)
    takeaway = (
        "No value would overflow float16."
        if not total
        else f"{total:,} values would become infinite in float16; the model needs bfloat16 or float32 there."
    )
    return Table("Overflow in float16", ["site", "max |x|", "room below 65,504", "beyond", "share"], rows, takeaway)


def _losses(result: ScanResult) -> Plot:
    part, format = result.total, result.settings["formats"][0]
    variants = list(dict.fromkeys(loss.variant for loss in part.losses))
    return Plot(
        "scan-losses",
        f"What {format} loses of the linear inputs",
        _losses_takeaway(part, format),
        "For each block the worst of its linear maps' inputs: the norm of what rounding takes away over the norm of "
        "what is there, in ordinary tokens. Scales come from each sequence itself. Between the red and the blue line "
        "is what the massive tokens cost; dotted lines are under the mask.",
        figures.figure(
            [_worst_losses(part, format, variant, kind) for kind in _KIND_COLOURS for variant in variants],
            axis(BLOCK),
            axis("relative error (log scale)", type="log", **_PERCENT),
        ),
    )


def _worst_losses(part: Part, format: str, variant: str, kind: str) -> Trace:
    """The largest error of each block."""
    worst: dict[int, float] = {}
    for loss in part.losses:
        if (loss.variant, loss.format, loss.kind) == (variant, format, kind) and loss.error is not None:
            worst[loss.layer] = max(loss.error, worst.get(loss.layer, 0.0))
    layers = sorted(worst)
    return figures.line(
        f"one scale a {kind}" + (", masked" if variant == "masked" else ""),
        layers,
        rounded([worst[layer] for layer in layers], 4),
        stroke(_KIND_COLOURS[kind], dash="dot" if variant == "masked" else "solid"),
        marker=None,
        template=hover("block %{x}: %{y:.2%}"),
    )


def _losses_takeaway(part: Part, format: str) -> str:
    plain = [loss for loss in part.losses if (loss.variant, loss.format) == ("plain", format)]
    largest = max((loss for loss in plain if loss.kind == "tensor"), key=lambda loss: loss.error or 0.0)
    at = {loss.kind: loss.error or 0.0 for loss in plain if (loss.site, loss.layer) == (largest.site, largest.layer)}
    return (
        f"The worst input is {largest.site} of block {largest.layer}: with one scale for a sequence {format} loses "
        f"{at['tensor']:.1%} of its ordinary tokens' norm, and {at['tensor without massive']:.1%} where the scale "
        "comes from the ordinary tokens alone."
    )


def _loss_table(result: ScanResult) -> Table:
    part = result.total
    variants = list(dict.fromkeys(loss.variant for loss in part.losses))
    columns = ["format", "one scale for", "site"]
    for variant in variants:
        columns += [f"{variant}: median", "worst", "block"]
    rows = []
    for format in result.settings["formats"]:
        for kind in KINDS:
            for site in LINEAR_INPUTS:
                found = [part.worst(variant, site, format, kind) for variant in variants]
                if not any(found):
                    continue
                cells: list[Any] = []
                for item in found:
                    cells += [ABSENT] * 3 if item is None else [f"{item[0]:.2%}", f"{item[1].error:.2%}", item[1].layer]
                rows.append([format, kind, site, *cells])
    return Table("Relative error of ordinary tokens: median over blocks and worst block", columns, rows, folded=True)


def _tokens(part: Part) -> Table:
    total = part.n_massive_first + part.n_massive_delimiters + part.n_massive_words
    rows = [
        [visible(row.token), row.token_id, row.kind, row.first, row.seen_first, row.later, row.seen_later]
        for row in part.massive[:30]
    ]
    takeaway = "No token is massive at any block's output."
    if total:
        takeaway = (
            f"Of {total:,} massive tokens {part.n_massive_first / total:.1%} are the first of their sequence, "
            f"{part.n_massive_delimiters / total:.1%} are later delimiters and {part.n_massive_words / total:.1%} "
            "something else."
        )
    columns = ["token", "id", "kind", "massive as first", "first", "massive later", "later"]
    return Table("Which tokens become massive", columns, rows, takeaway)


def _growth(part: Part) -> Plot:
    chosen = sorted(
        ((site, curve) for site, curve in part.growth.items() if len(curve) > 1),
        key=lambda item: -item[1][-1][1],
    )[:6]
    data = []
    for place, (site, curve) in enumerate(chosen):
        counts, maxima = zip(*curve, strict=True)
        style = stroke(_PALETTE[place % len(_PALETTE)], dash="solid" if place < len(_PALETTE) else "dash")
        template = hover("%{x:,} documents: %{y:,.4g}", site)
        data.append(figures.line(site, counts, rounded(maxima, 5), style, marker=4, template=template))
    takeaway = "One document alone does not show how the maximum grows."
    if chosen:
        site, curve = chosen[0]
        half = min(curve, key=lambda point: abs(point[0] - curve[-1][0] / 2))
        takeaway = (
            f"In {site}, {half[0]:,} documents would have shown {half[1] / curve[-1][1]:.1%} of the maximum of all "
            f"{curve[-1][0]:,}."
        )
    return Plot(
        "scan-growth",
        "How the maximum grows with the corpus",
        takeaway,
        "The expected largest |x| of so many documents, drawn from those scanned without replacement, in the block "
        "with the largest of each site. A curve that is flat at its right end has seen what there is; one that still "
        "rises has not.",
        figures.figure(
            data, axis("documents (log scale)", type="log"), axis("expected max |x| (log scale)", type="log")
        ),
    )


def _sites(part: Part, title: str, *, folded: bool = False) -> Table:
    columns = ["site", "block", "max |x|", "interval", "document", "token", "dim", "99.99 %", "mean", "sd", "kurtosis"]
    rows = [_row(row) for row in part.by_site()]
    takeaway = f"{part.documents:,} documents, {part.tokens:,} tokens."
    return Table(title, columns, rows, takeaway, folded=folded)


def _row(row: PlaceRow) -> list[Any]:
    interval = ABSENT if row.interval is None else f"{row.interval[0]:,.1f} to {row.interval[1]:,.1f}"
    return [
        row.site,
        ABSENT if row.layer is None else row.layer,
        number(row.max_abs, 1),
        interval,
        row.document,
        f"{row.token_index}: {visible(row.token)}",
        row.dim,
        number(row.quantiles["0.9999"], 1),
        number(row.mean, 4),
        number(None if row.variance is None else math.sqrt(row.variance), 3),
        number(row.kurtosis, 1),
    ]
