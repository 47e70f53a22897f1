"""A sinks result at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.presentation.tables import ABSENT, print_answer, print_text, table

if TYPE_CHECKING:
    from melayer.measurements.sinks.result import SinksResult

_LISTED = 12


def show_sinks(result: SinksResult, console: Console) -> None:
    """Prints a sinks result: the answer, the rate by block, the strongest heads."""
    print_answer(console, result.sentence, result.notes)
    console.print(_blocks(result))
    if result.heads:
        console.print(_heads(result))
    massive, model = result.massive, result.model
    if massive is not None:
        after = "" if massive.rate_after_me is None else f", {massive.rate_after_me:.1%} after the ME layer"
        print_text(
            console,
            f"\nMassive tokens: {massive.n_tokens}, {massive.n_not_first} of them not first; sinks in "
            f"{massive.rate:.1%} of all heads{after}.",
        )
    print_text(
        console,
        f"rate: the share of (sequence, head) in which key {result.key} draws more than {result.epsilon:g} of the "
        f"attention (mean over the queries from there on); mean, highest: over the heads. It falls with T, so compare "
        f"only the same T. {model.name}, {model.dtype}, fingerprint {model.fingerprint}. "
        "Blocks, heads and keys are 0-based.",
        style="dim",
    )


def _blocks(result: SinksResult) -> Table:
    columns = [("block", True), ("rate", True), ("mean", True), ("highest", True), ("head", True), ("", False)]
    rows = []
    for layer, (rate, alpha) in enumerate(zip(result.rate_by_layer, result.alpha, strict=True)):
        mark = "<- ME layer" if layer == result.me_layer else ""
        known = [(value, head) for head, value in enumerate(alpha or ()) if value is not None]
        if rate is None or not known:
            rows.append([layer, *[ABSENT] * 4, mark or "no softmax attention"])
            continue
        highest, head = max(known)
        mean = sum(value for value, _ in known) / len(known)
        rows.append([layer, f"{rate:.1%}", f"{mean:.1%}", f"{highest:.1%}", head, mark])
    return table(f"Attention on key {result.key}, T = {result.T}, {result.n_sequences} sequences", columns, rows)


def _heads(result: SinksResult) -> Table:
    columns = [("block", True), ("head", True), ("draws", True), ("sink in", True)]
    rows = [[row.layer, row.head, f"{row.alpha:.1%}", f"{row.share:.0%}"] for row in result.heads[:_LISTED]]
    more = f", {_LISTED} of {len(result.heads)}" if len(result.heads) > _LISTED else ""
    return table(f"Heads that are sinks in more than half of the sequences{more}", columns, rows)
