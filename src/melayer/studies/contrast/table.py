"""Two models side by side at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from melayer.presentation.tables import ABSENT, print_answer, print_text, table
from melayer.studies.contrast.report import cells_of, columns_of

if TYPE_CHECKING:
    from melayer.studies.contrast.result import ContrastResult


def show_contrast(result: ContrastResult, console: Console) -> None:
    """Prints the answer, then each figure of both models."""
    print_answer(console, result.sentence, result.notes)
    rows = [[figure.name, *cells_of(result, figure, ABSENT)] for figure in result.figures]
    columns = [("", False), *((name, True) for name in columns_of(result))]
    console.print(table("Before and after", columns, rows))
    if result.after_masked is not None:
        print_text(
            console,
            "by training: after less before, without the mask. by the mask: before, masked, less before. by both: what "
            "the mask changes after training beyond that. The three are the change from before to after, masked.",
            style="dim",
        )
    before, after = result.before.located.model, result.after.located.model
    print_text(
        console,
        f"before: {before.name}, fingerprint {before.fingerprint}. after: {after.name}, fingerprint "
        f"{after.fingerprint}. The same texts; sinks at T = {result.T}. Blocks and dimensions are 0-based.",
        style="dim",
    )
