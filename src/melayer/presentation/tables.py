"""What every terminal table has in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

# The columns that give way where the terminal is narrow.
WRAPPED = frozenset({"begins", "metric", "variant"})


def table(title: str, columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[Any]]) -> Table:
    """A table without rules; columns are (name, whether it holds numbers), and a number is never cut."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [[str(cell) for cell in row] for row in rows]
    for place, (name, numeric) in enumerate(columns):
        width = max([len(name), *(len(row[place]) for row in shown)]) if numeric else None
        made.add_column(
            name,
            justify="right" if numeric else "left",
            min_width=width,
            overflow="fold",
            no_wrap=name not in WRAPPED,
        )
    for row in shown:
        made.add_row(*map(escape, row))
    made.title = f"\n{title}"
    return made


def number(value: float | None, digits: int = 0) -> str:
    """A number for a table; `-` where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"
