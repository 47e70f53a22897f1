"""What happens around a command: progress and errors on stderr, warnings as lines, loading."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from melayer.cli.streams import say, stderr
from melayer.errors import MelayerError, MelayerWarning, ProcessError, reason

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded

Advance = Callable[..., None]
"""Called with what is done, what there is in all, and for some a note to show beside the bar."""

ISSUES = "https://github.com/melayer/melayer/issues"
INPUT, UNEXPECTED, STOPPED = 2, 70, 130
"""Exit codes: something that was given cannot be used; a fault of melayer's own; Ctrl-C."""

_WORDS: ContextVar[tuple[str, ...]] = ContextVar("_WORDS", default=())
GOES_ON = {"sweep": "", "scan": "", "eval": "", "quant-check": "", "sft": " with --resume", "dpo": " with --resume",
           "grpo": " with --resume"}  # fmt: skip
"""The commands that keep what is finished in --out, and what the same command needs to go on from there."""


@contextmanager
def asked(words: list[str]) -> Iterator[None]:
    """Inside, the command line is this one."""
    token = _WORDS.set(tuple(words))
    try:
        yield
    finally:
        _WORDS.reset(token)


def command_line() -> str:
    """The command as it was typed, for a page's provenance."""
    return shlex.join(["melayer", *_WORDS.get()])


def words() -> tuple[str, ...]:
    """The command as it was typed, without the program's name."""
    return _WORDS.get()


@contextmanager
def session(debug: bool, kept: str = "") -> Iterator[None]:
    """Turns whatever ends a command into a sentence and an exit code, and our warnings into a line.

    Args:
        debug: Show traces, and what other libraries warn of.
        kept: What stands when the command is stopped, a sentence.
    """
    # Before tqdm is imported, which reads it then: transformers draws bars of its own while it unpacks a GGUF file.
    os.environ.setdefault("TQDM_DISABLE", "1")
    with _warnings(debug):
        try:
            yield
        except BaseException as error:
            end = _end(error, kept)
            if end is None:
                raise
            if debug:
                traceback.print_exc()
            code, sentence = end
            if sentence:
                say(f"melayer: {sentence}")
            raise typer.Exit(code) from error


def _end(error: BaseException, kept: str) -> tuple[int, str] | None:
    """The exit code and the sentence with which an exception ends the command; None where both are decided."""
    if isinstance(error, typer.Exit | GeneratorExit):
        return None
    if isinstance(error, MelayerError):
        return INPUT, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return STOPPED, f"Stopped. {kept or 'Nothing was kept.'}"
    message = getattr(error, "format_message", None)
    if message is not None:  # what typer says of options
        context = getattr(error, "ctx", None)
        path = "melayer" if context is None else context.command_path
        if type(error).__name__ == "NoArgsIsHelpError":  # which has printed the help
            return INPUT, "No command was given. Choose one of those above."
        said = _shortened(message())
        return INPUT, f"{said}{'' if said.endswith(('.', '?')) else '.'} See {path} --help."
    return UNEXPECTED, (
        f"unexpected {type(error).__name__}: {reason(error)}. This is a fault of melayer's: run the command again with "
        f"--debug, and please report what it prints at {ISSUES}."
    )


def _shortened(text: str) -> str:
    """A message in which somebody's argument of any length may stand."""
    return text if len(text) <= 400 else f"{text[:200]} … {text[-150:]}"


@contextmanager
def exit_code() -> Iterator[Callable[[], int]]:
    """What a session inside ended with, for `sys.exit`."""
    ended = [0]
    try:
        yield lambda: ended[0]
    except typer.Exit as end:
        ended[0] = end.exit_code


@contextmanager
def _warnings(debug: bool) -> Iterator[None]:
    """Our own warnings become lines; what others have to say of their own ways is shown to who looks for a fault."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, MelayerWarning):
            say(f"Note: {message}")
        else:
            shown(message, category, *rest, **more)

    shown, last = warnings.showwarning, logging.lastResort
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.lastResort = logging.NullHandler()
        warnings.simplefilter("always", MelayerWarning)
        warnings.showwarning = show
        try:
            yield
        finally:
            logging.lastResort = last


def what_is_kept(command: str, out: Path | None) -> str:
    """What stands when a command is stopped, a sentence; empty where nothing does.

    Args:
        command: The last word of its name.
        out: What it got as --out.
    """
    if out is None or command not in GOES_ON or not out.is_dir():
        return ""
    return f"What was kept in {out} stands, and the same command goes on from there{GOES_ON[command]}."


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
