"""A locate result at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.data.rows import visible
from melayer.measurements.locate.words import STARTS, has_later_peak, kind
from melayer.presentation.tables import ABSENT, change, number, print_answer, print_text, table

if TYPE_CHECKING:
    from melayer.measurements.locate.figures import FirstTokens
    from melayer.measurements.locate.result import LocateResult

_LISTED = 12


def show_locate(result: LocateResult, console: Console) -> None:
    """Prints a locate result: the answer, the blocks, the stages, the massive scalars and the texts."""
    print_answer(console, result.sentence, result.notes)
    console.print(_blocks(result))
    if result.shares:
        console.print(_stages(result))
    if result.massive:
        console.print(_massive(result))
    console.print(_sequences(result))
    if result.first_tokens is not None and len(result.first_tokens.rows) > 1:
        console.print(_first_tokens(result.first_tokens))
    bos, model = result.settings["bos"], result.model
    print_text(
        console,
        f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}; {result.settings['n_tokens']} tokens "
        f"in {len(result.sequences)} texts, {bos['sequences_with_bos']} of them with BOS. "
        "Blocks, tokens and dimensions are 0-based.",
        style="dim",
    )


def _blocks(result: LocateResult) -> Table:
    columns = [
        ("block", True),
        ("max |h|", True),
        ("ratio", True),
        ("token", True),
        ("", False),
        ("dim", True),
        ("massive", True),
        ("texts", True),
        ("share", True),
        ("", False),
    ]
    rows = []
    shares = {stage.layer: stage.share for stage in result.shares}
    voting = sum(row.votes for row in result.sequences)
    peak_layer = result.peak.layer if result.peak is not None and has_later_peak(result) else None
    for row in result.blocks:
        mark = []
        if row.layer == result.me_layer:
            mark.append("<- ME layer")
        elif row.layer in {stage.layer for stage in result.stages}:
            mark.append("stage")
        if row.layer == peak_layer:
            mark.append("peak")
        if row.layer in result.erased_at:
            mark.append("erases")
        if row.n_non_finite:
            mark.append(f"{row.n_non_finite} tokens not finite")
        rows.append(
            [
                row.layer,
                number(row.max_abs, 1),
                number(row.ratio),
                row.token_index,
                visible(row.token),
                row.dim,
                row.n_massive,
                f"{row.n_holding}/{voting}",
                change(shares.get(row.layer)),
                ", ".join(mark),
            ]
        )
    return table("Blocks", columns, rows)


def _stages(result: LocateResult) -> Table:
    columns = [("block", True), ("", False), ("share", True), ("attention", True), ("FFN", True)]
    rows = []
    stages = {stage.layer for stage in result.stages}
    for row in result.shares:
        if row.layer in stages or row.layer in result.erased_at:
            does = "adds" if row.share > 0 else "erases"
            rows.append([row.layer, does, *map(change, (row.share, row.attn_share, row.ffn_share))])
    return table(f"Emergence: {kind(result)}", columns, rows)


def _massive(result: LocateResult) -> Table:
    columns = [("block", True), ("text", True), ("token", True), ("", False), ("dim", True), ("value", True)]
    at = [scalar for scalar in result.massive if result.me_layer in (None, scalar.layer)]
    where = f"at block {result.me_layer}" if result.me_layer is not None else "at every block"
    total = result.n_massive if result.me_layer is None else result.blocks[result.me_layer].n_massive
    shown = min(len(at), _LISTED)
    more = f", {shown} of {total:,}" if shown < total else ""
    rows = [[s.layer, s.sequence, s.token_index, visible(s.token), s.dim, number(s.value, 1)] for s in at[:_LISTED]]
    return table(f"Massive scalars {where}{more}", columns, rows)


def _sequences(result: LocateResult) -> Table:
    columns = [
        ("text", True),
        ("tokens", True),
        ("holds", False),
        ("massive token", False),
        ("first token", False),
        ("begins", False),
    ]
    rows = []
    for row in result.sequences:
        holds = {True: "yes", False: "no", None: "-"}[row.holds] if row.votes else "too short"
        massive = ABSENT if row.massive_token is None else f"{row.massive_token_index}: {visible(row.massive_token)}"
        begins = visible(row.text[:32])
        rows.append([row.index, row.n_tokens, holds, massive, visible(row.first_token), begins])
    return table("Texts", columns, rows)


def _first_tokens(found: FirstTokens) -> Table:
    columns = [("first token", False), ("what it is", False), ("ME layer", True), ("holds", True)]
    columns += [("it is massive", True), ("max |h|", True), ("block", True)]
    n = found.n_sequences
    rows = [
        [
            ABSENT if row.token is None else visible(row.token),
            ", ".join(STARTS[kind] for kind in row.kinds),
            ABSENT if row.me_layer is None else row.me_layer,
            f"{row.n_holding}/{n}",
            f"{row.n_first_massive}/{n}",
            number(row.max_abs, 1),
            row.layer,
        ]
        for row in found.rows
    ]
    flips = "not the same" if found.differing else "the same"
    return table(f"With another first token: {flips} ({n} texts of up to {found.max_tokens} tokens)", columns, rows)
