"""stdout and stderr: whatever their encoding, and whoever has closed them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from melayer.errors import OutputError, reason
from melayer.runs.json_text import json_text, well_formed


class Stdout(Console):
    """A console on stdout for what people read."""

    def on_broken_pipe(self) -> None:
        """Rich would end the program with exit code 1, whatever there is to finish."""
        raise OutputError("The result cannot be written to stdout: whoever read it has closed it.")


def stderr() -> Console:
    """Where everything goes that is not the result."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line on stderr, if anybody is left to read it: no line breaks, no control characters of a hostile name."""
    with contextlib.suppress(OSError, ValueError):
        stderr().print(one_line(text), markup=False, soft_wrap=True)


def one_line(text: str) -> str:
    """A text of one line that every terminal can show, with escapes for what is no character to be seen."""
    joined = " ".join(part.strip() for part in well_formed(text).splitlines() if part.strip())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in joined)


def prepare() -> None:
    """What has to hold before anything is run: the three streams are there, and no character is an error.

    Raises:
        OutputError: stdout was closed before the command began.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Or the next file that is opened would become the stream.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for as long as we run
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        raise OutputError("stdout is closed, and results go there. Redirect it to a file or to /dev/null instead.")
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def to_stdout() -> Iterator[None]:
    """What is printed inside has left this process at the end.

    Raises:
        OutputError: Its reader is gone, or there is no space for it.
    """
    try:
        yield
        sys.stdout.flush()
    except (OSError, OutputError) as error:
        _give_up()
        if isinstance(error, OutputError):
            raise
        why = "whoever read it has closed it" if isinstance(error, BrokenPipeError) else reason(error)
        raise OutputError(f"The result cannot be written to stdout: {why}.") from error


def print_json(values: Any) -> None:
    """Prints values as JSON: in UTF-8 as it is, in other encodings with escapes."""
    ascii_only = (sys.stdout.encoding or "ascii").lower().replace("-", "").replace("_", "") != "utf8"
    with to_stdout():
        sys.stdout.write(json_text(values, indent=1, ascii_only=ascii_only) + "\n")


def _give_up() -> None:
    """What is left in the buffer goes nowhere, so that nothing is said of it when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
