"""What happens around a command: progress and errors on stderr, warnings as lines, loading."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from melayer.errors import MelayerError, MelayerWarning, ProcessError

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded

Advance = Callable[..., None]
"""Called with what is done, what there is in all, and for some a note to show beside the bar."""


def stderr() -> Console:
    """Where everything goes that is not the result."""
    return Console(stderr=True, highlight=False)


@contextmanager
def session(debug: bool) -> Iterator[None]:
    """Turns our errors into a sentence and exit code 2, and our warnings into a line."""
    console = stderr()
    # Before tqdm is imported, which reads it then: transformers draws bars of its own while it unpacks a GGUF file.
    os.environ.setdefault("TQDM_DISABLE", "1")

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, MelayerWarning):
            console.print(f"Note: {message}", markup=False)
        else:
            shown(message, category, *rest, **more)

    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", MelayerWarning)
        warnings.showwarning = show
        try:
            yield
        except MelayerError as error:
            if debug:
                traceback.print_exc()
            console.print(f"melayer: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error


@contextmanager
def stopped_by_term(store: Path | None) -> Iterator[None]:
    """A launcher that ends its processes because one has died gets an answer from the others: what stands, and how
    to go on.
    """

    def stop(number: int, frame: object) -> None:
        kept = "nothing was kept, for want of --out"
        if store is not None:
            kept = f"what was kept in {store} stands, and the same command goes on from there"
        raise ProcessError(f"Stopped by SIGTERM, as launchers send it when another process has died: {kept}.")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_device(loading: dict[str, Any]) -> dict[str, Any]:
    """For each process of a launcher a GPU of its own, where there are some and none was named."""
    import torch

    if "LOCAL_RANK" not in os.environ or loading["device"] != "auto" or loading["device_map"] is not None:
        return {}
    return {"device": f"cuda:{os.environ['LOCAL_RANK']}"} if torch.cuda.is_available() else {}


def load(model: str, options: dict[str, Any]) -> Loaded:
    """The model, with a word on stderr while it loads."""
    with stderr().status(f"Loading {model} (a GGUF file is unpacked once, which takes half a minute)"):
        quiet()
        from melayer.interventions import load as models

        return models.load(model, **options)


def quiet() -> None:
    """What transformers says while it loads is for its own users; what matters comes back as our errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress(*titles: str, unit: str = "tokens") -> Iterator[Callable[[int], Advance]]:
    """One bar on stderr over as many parts as there are titles, with the rate and the remaining time.

    Gives a function from a part's place to the function that moves the bar on within it.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s,"),
        TimeRemainingColumn(),
        TextColumn("left{task.fields[note]}"),
    )
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(titles[0], total=len(titles), rate="-", note="")

        def part(place: int) -> Advance:
            title = titles[place] if len(titles) == 1 else f"{titles[place]} ({place + 1} of {len(titles)})"
            bar.update(task, description=title, completed=place)
            started = bar.get_time()

            def advance(done: int, total: int | None, note: str = "") -> None:
                elapsed = bar.get_time() - started
                rate = f"{done / elapsed:,.{0 if done > 10 * elapsed else 2}f}" if elapsed > 0 else "-"
                # Of a stream nobody knows the end, and the bar stays where it is.
                share = done / total if total else 0.0
                bar.update(task, completed=place + share, rate=rate, note=note and f", {note}")

            return advance

        yield part
