"""The answer of a command: JSON for machines, or a table for people and where the page is."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from melayer.cli.commands import positionals
from melayer.cli.session import GOES_ON, command_line, words
from melayer.cli.streams import Stdout, print_json, to_stdout
from melayer.errors import OutputError

if TYPE_CHECKING:
    from melayer.presentation.page import Written

__all__ = ["answer", "command_line", "page", "require_writable", "written_or_shown"]


def answer(
    as_json: bool,
    values: Callable[[], dict[str, Any]],
    show: Callable[[Console], None],
    written: Written | None = None,
    *,
    before: str = "",
    behind: str = "",
) -> None:
    """Prints a result on stdout.

    Args:
        as_json: Whether a machine reads it.
        values: The result as plain values, asked for only if a machine reads it.
        show: Prints it for a person.
        written: The files of its page, if there is one.
        before: A line before the one that says where the page is.
        behind: More to say behind it.
    """
    if as_json:
        print_json(values())
        return
    with to_stdout():
        show(Stdout())
    if written is not None:
        page(written, before=before, behind=behind)


def written_or_shown(
    write: Callable[[], Written], as_json: bool, values: Callable[[], dict[str, Any]], show: Callable[[Console], None]
) -> Written:
    """The page that `write` writes; where it cannot be after all, what was measured goes to stdout before that is said.

    For commands that keep nothing while they measure.

    Raises:
        OutputError: The page cannot be written.
    """
    try:
        return write()
    except OutputError:
        answer(as_json, values, show)
        raise


def page(written: Written, *, before: str = "", behind: str = "") -> None:
    """Says where a page is."""
    lines = Stdout(soft_wrap=True, highlight=False)
    with to_stdout():
        if before:
            lines.print(before, markup=False)
        lines.print(f"Open {written.html} in a browser; {written.json} holds the same figures.{behind}", markup=False)


def require_writable(out: Path | None) -> None:
    """Raises OutputError unless a page can be written to `out`, before anything is measured for it.

    A page of the same command on the same models may be there, and will be replaced; that of another one is a result
    that nobody asked to lose. Commands that go on from what they kept there look themselves whether it is of the same.
    """
    if out is None:
        return
    from melayer.presentation.page import check_writable, files_of, made_by

    check_writable(out)
    before, now = made_by(out), words()
    if not files_of(out).json.exists() and not files_of(out).html.exists():
        return
    mine = positionals(_root(), now)
    other = None if before is None else positionals(_root(), shlex.split(before)[1:])
    if mine is not None and other is not None and mine[0] == other[0]:
        looks_itself = mine[0].split()[-1] in GOES_ON
        if looks_itself or mine[1] == other[1]:
            return
    made = "Python" if before is None else f"`{before}`"
    raise OutputError(
        f"{out} holds a report already, made by {made}, which would be lost. Give another directory with --out."
    )


def _root() -> Any:
    """The group of all commands."""
    import typer

    from melayer.cli import app

    return typer.main.get_command(app)
