"""The command line: parse, call, print. Data on stdout, progress and errors on stderr."""

from __future__ import annotations

from typing import Annotated

import typer

from melayer.cli import demo, evaluation, generating, measuring, quantising, scanning, tuning
from melayer.cli.commands import Commands
from melayer.version import __version__

app = typer.Typer(
    name="melayer",
    cls=Commands,
    help="Find, explain, measure and relax massive activations in language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, explain, measure and relax massive activations in language models."""


# In the order of the help.
for group in (demo, measuring, generating, evaluation, quantising, tuning, scanning):
    app.add_typer(group.commands)
app.add_typer(tuning.tune_app, name="tune", cls=Commands)


def main() -> None:
    """The entry point of the `melayer` command."""
    app()
