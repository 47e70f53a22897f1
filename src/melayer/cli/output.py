"""The answer of a command: JSON for machines, or a table for people and where the page is."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from melayer.presentation.page import Written


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
        typer.echo(json.dumps(values(), ensure_ascii=False, indent=1, allow_nan=False))
        return
    show(Console())
    if written is not None:
        page(written, before=before, behind=behind)


def page(written: Written, *, before: str = "", behind: str = "") -> None:
    """Says where a page is."""
    lines = Console(soft_wrap=True, highlight=False)
    if before:
        lines.print(before, markup=False)
    lines.print(f"Open {written.html} in a browser; {written.json} holds the same figures.{behind}", markup=False)


def command_line() -> str:
    """The command as it was typed, for a page's provenance."""
    return shlex.join(["melayer", *sys.argv[1:]])


def require_writable(out: Path | None) -> None:
    """Raises OutputError unless a page can be written to `out`, before anything is measured for it."""
    if out is not None:
        from melayer.presentation.page import check_writable

        check_writable(out)
