"""Two models side by side at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from melayer.presentation.tables import number, table

if TYPE_CHECKING:
    from melayer.studies.contrast.result import ContrastResult


def show_contrast(result: ContrastResult, console: Console) -> None:
    """Prints the answer, then each figure of both models."""
    console.print(f"[bold]{escape(result.sentence)}[/]", highlight=False)
    for note in result.notes:
        console.print(escape(note), style="dim", highlight=False)
    rows = []
    for figure in result.figures:
        digits = 0 if figure.name == "largest |h|" else 4
        sides = [
            number(value, digits) if isinstance(value, float) else "-" if value is None else str(value)
            for value in (figure.before, figure.after)
        ]
        rows.append([figure.name, *sides])
    console.print(table("Before and after", [("", False), ("before", True), ("after", True)], rows))
    before, after = result.before.located.model, result.after.located.model
    console.print(
        f"before: {escape(before.name)}, fingerprint {before.fingerprint}. after: {escape(after.name)}, fingerprint "
        f"{after.fingerprint}. The same texts; sinks at T = {result.T}. Blocks and dimensions are 0-based.",
        style="dim",
        highlight=False,
    )
