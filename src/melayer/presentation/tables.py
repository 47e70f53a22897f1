"""What every terminal table has in common."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from melayer.presentation import numbers

ABSENT = "-"
"""Stands at a terminal where there is no number."""

# The columns that give way where the terminal is narrow.
WRAPPED = frozenset({"begins", "metric", "variant", "what it is"})

number = partial(numbers.number, absent=ABSENT)
percent = partial(numbers.percent, absent=ABSENT)
share = partial(numbers.share, absent=ABSENT)
change = partial(numbers.change, absent=ABSENT)


def table(title: str, columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[Any]]) -> Table:
    """A table without rules, under an empty line; columns are (name, whether it holds numbers).

    A number is never cut. Cells and titles are shown as they are: nothing in them is markup.
    """
    made = Table(
        title=Text(f"\n{title}", style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    written = [[str(cell) for cell in row] for row in rows]
    for place, (name, numeric) in enumerate(columns):
        made.add_column(
            Text(name),
            justify="right" if numeric else "left",
            min_width=max([len(name), *(len(row[place]) for row in written)]) if numeric else None,
            overflow="fold",
            no_wrap=name not in WRAPPED,
        )
    for row in written:
        made.add_row(*map(Text, row))
    return made


def print_answer(console: Console, sentence: str, notes: Iterable[str]) -> None:
    """Prints what every result begins with: its answer, then what its reader has to know."""
    print_text(console, sentence, style="bold")
    for note in notes:
        print_text(console, note, style="dim")


def print_text(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints text as it is: nothing in it is markup, a number that gets a colour, or the name of an emoji."""
    console.print(Text(text), style=style)
