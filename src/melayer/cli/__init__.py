"""The command line: parse, call, print. Data on stdout, progress and errors on stderr."""

from __future__ import annotations

from typing import Annotated

import typer

from melayer.cli.demo import demo_command
from melayer.cli.evaluation import compare_command, eval_command
from melayer.cli.generating import generate_command
from melayer.cli.measuring import (
    explain_command,
    locate_command,
    report_command,
    rigidity_command,
    sinks_command,
    sweep_command,
)
from melayer.cli.quantising import quant_check_command
from melayer.cli.scanning import scan_command
from melayer.cli.tuning import contrast_command, tune_app
from melayer.version import __version__

app = typer.Typer(
    name="melayer",
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


app.command("demo")(demo_command)
app.command("locate")(locate_command)
app.command("explain")(explain_command)
app.command("rigidity")(rigidity_command)
app.command("sinks")(sinks_command)
app.command("sweep")(sweep_command)
app.command("report")(report_command)
app.command("generate")(generate_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("quant-check")(quant_check_command)
app.command("contrast")(contrast_command)
app.command("scan")(scan_command)
app.add_typer(tune_app, name="tune")


def main() -> None:
    """The entry point of the `melayer` command."""
    app()
