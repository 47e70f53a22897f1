"""A quantisation check at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.numerics.paired import Difference
from melayer.presentation.tables import ABSENT, percent, print_answer, print_text, table
from melayer.quantisation.result import QuantCheckResult, shown

if TYPE_CHECKING:
    from collections.abc import Iterable


def show_quant_check(result: QuantCheckResult, console: Console) -> None:
    """Prints the answer, every setting on a line, what follows, and the worst sites."""
    print_answer(console, result.sentence, result.notes)
    console.print(_settings(result))
    if result.changes:
        console.print(_changes(result))
    console.print(_worst(result))
    under = result.unquantised_mask
    print_text(
        console,
        f"Unquantised: {shown(result.unquantised.perplexity)}"
        + ("" if under is None else f", under the mask {shown(under.perplexity)}")
        + ". cost: mean log-loss against the unquantised model, in nats a token, with its "
        f"{result.settings['level']:.0%} interval by sequence; each stands alone: of twenty one leaves out 0 by "
        "chance. error: median over the linear inputs of the relative error of ordinary tokens. Rounded is what the "
        "linear maps of the blocks read; the head, the weights, keys and values are not. "
        f"{result.model.name}, {result.model.dtype}, fingerprint {result.model.fingerprint}. "
        "Blocks are 0-based.",
        style="dim",
    )


def _settings(result: QuantCheckResult) -> Table:
    columns = [("format", False), ("scales", False), ("treatment", False), ("perplexity", True), ("cost", True)]
    columns += [("interval", True), ("error", True)]
    rows = [
        [
            row.format,
            row.granularity,
            row.treatment,
            shown(row.score.perplexity),
            ABSENT if row.cost is None else f"{row.cost.value:+.3f}",
            _ends(row.cost),
            percent(row.median_error),
        ]
        for row in result.rows
    ]
    title = f"Quantised activations, T = {result.T}, {result.n_sequences} sequences"
    return table(title, columns, rows)


def _changes(result: QuantCheckResult) -> Table:
    columns = [("format", False), ("scales", False), ("what", False), ("nats a token", True), ("interval", True)]
    rows = [
        [change.format, change.granularity, change.what, f"{change.by.value:+.3f}", _ends(change.by), change.verdict]
        for change in result.changes
    ]
    return table("What baking and the mask change (below 0: given back)", [*columns, ("", False)], rows)


def _worst(result: QuantCheckResult) -> Table:
    def lines() -> Iterable[list[str]]:
        for row in result.rows:
            for at, error in result.worst(row, 1):
                yield [row.label, at.label, f"{error:.1%}"]

    return table("Worst linear inputs", [("setting", False), ("input", False), ("error", True)], lines())


def _ends(found: Difference | None) -> str:
    return ABSENT if found is None or found.low is None else f"{found.low:+.3f} {found.high:+.3f}"
