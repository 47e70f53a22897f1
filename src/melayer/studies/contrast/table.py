"""Two models side by side at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from melayer.presentation.tables import ABSENT, print_answer, print_text, table
from melayer.studies.contrast.report import side_text

if TYPE_CHECKING:
    from melayer.studies.contrast.result import ContrastResult


def show_contrast(result: ContrastResult, console: Console) -> None:
    """Prints the answer, then each figure of both models."""
    print_answer(console, result.sentence, result.notes)
    rows = [
        [figure.name, *(side_text(figure, value, ABSENT) for value in (figure.before, figure.after))]
        for figure in result.figures
    ]
    console.print(table("Before and after", [("", False), ("before", True), ("after", True)], rows))
    before, after = result.before.located.model, result.after.located.model
    print_text(
        console,
        f"before: {before.name}, fingerprint {before.fingerprint}. after: {after.name}, fingerprint "
        f"{after.fingerprint}. The same texts; sinks at T = {result.T}. Blocks and dimensions are 0-based.",
        style="dim",
    )
