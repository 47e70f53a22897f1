"""A scan at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from melayer.census.rounding_error import KINDS, LINEAR_INPUTS
from melayer.data.rows import visible
from melayer.presentation.tables import ABSENT, number, print_answer, print_text, table

if TYPE_CHECKING:
    from melayer.census.result import Part, ScanResult

_SHOWN_TOKENS = 10


def show_scan(result: ScanResult, console: Console) -> None:
    """Prints a scan: the answer, the largest values of each site, the massive tokens, what rounding loses."""
    print_answer(console, result.sentence, result.notes)
    _sites(result.total, console)
    for part in result.categories:
        _sites(part, console, title=f"Category {part.name or '(empty)'}: ")
    _tokens(result.total, console)
    if result.total.losses:
        _losses(result, console)
    model, settings = result.model, result.settings
    print_text(
        console,
        "max |x|: over all blocks, with the block; at least: the lower end of its 95 % bootstrap interval over "
        "documents. 99.99 %: that share of |x| in that block does not exceed it, to 1 %. beyond fp16: values in all "
        "blocks that become infinite in float16. Sequences of at most "
        f"{settings['max_tokens']} tokens. {model.name}, {model.dtype}, fingerprint {model.fingerprint}. All "
        "counting is 0-based.",
        style="dim",
    )


def _sites(part: Part, console: Console, title: str = "") -> None:
    columns = [("site", False), ("block", True), ("max |x|", True), ("at least", True), ("token", False)]
    columns += [("dim", True), ("99.99 %", True), ("beyond fp16", True)]
    rows = []
    for row in part.by_site():
        beyond = sum(other.beyond_fp16 for other in part.places if other.site == row.site)
        rows.append(
            [
                row.site,
                ABSENT if row.layer is None else row.layer,
                "not finite" if row.max_abs is None else number(row.max_abs, 1),
                ABSENT if row.interval is None else number(row.interval[0], 1),
                f"{row.token_index}:{visible(row.token)}"[:14],
                row.dim,
                number(row.quantiles["0.9999"], 1),
                f"{beyond:,}",
            ]
        )
    title += f"{part.documents:,} documents, {part.sequences:,} sequences, {part.tokens:,} tokens"
    console.print(table(title, columns, rows))


def _tokens(part: Part, console: Console) -> None:
    total = part.n_massive_first + part.n_massive_delimiters + part.n_massive_words
    if not total:
        print_text(console, "\nNo token is massive at any block's output.")
        return
    columns = [("token", False), ("kind", False), ("massive first", True), ("of", True)]
    columns += [("massive later", True), ("of", True)]
    rows = [
        [visible(row.token), row.kind, f"{row.first:,}", f"{row.seen_first:,}", f"{row.later:,}", f"{row.seen_later:,}"]
        for row in part.massive[:_SHOWN_TOKENS]
    ]
    title = (
        f"{total:,} massive tokens: {part.n_massive_first:,} first in their sequence, "
        f"{part.n_massive_delimiters:,} later delimiters, {part.n_massive_words:,} others"
    )
    console.print(table(title, columns, rows))


def _losses(result: ScanResult, console: Console) -> None:
    variants = list(dict.fromkeys(loss.variant for loss in result.total.losses))
    columns = [("format", False), ("one scale for", False), ("site", False)]
    for variant in variants:
        columns += [(variant, True), ("worst", True), ("block", True)]
    rows = []
    for format in result.settings["formats"]:
        for kind in KINDS:
            for site in LINEAR_INPUTS:
                found = [result.total.worst(variant, site, format, kind) for variant in variants]
                cells = []
                for item in found:
                    cells += [ABSENT] * 3 if item is None else [
                        f"{item[0]:.2%}", f"{item[1].error:.2%}", str(item[1].layer)
                    ]  # fmt: skip
                if any(found):
                    rows.append([format, kind, site, *cells])
    console.print(table("Relative error of ordinary tokens: median over blocks, and the worst block", columns, rows))
