"""Processes that tests kill, stop or let meet, quickly: forked off a server that has imported everything once.

A start from nothing imports torch, transformers and TRL for five seconds each time. What a process is when somebody
types a command is tested where that is the question: cli/test_measuring.py, test_distributed.py, test_frugal.py,
test_package.py and one of the launchers in test_scan.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from melayer import cli
from melayer.census.scan import scan
from melayer.evaluation.evaluate import evaluate
from melayer.tuning import trainers

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([trainers.__name__, evaluate.__module__, scan.__module__])
PATIENCE = 900.0
"""Seconds after which a process hangs: no machine is so loaded that it takes as long for what it does in a few."""


def started(function: Callable[..., object], *arguments: object, output: Path | None = None, **environment: str) -> Any:
    """A process that runs a function of a module, with more in its environment, and says what it says to files."""
    process = SERVER.Process(target=_within, args=(function, arguments, output, environment), daemon=True)
    process.start()
    return process


def ended(process: Any) -> int:
    """Its exit code: minus the signal's number where one ended it."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("The process hangs.")
    return int(process.exitcode)


def errors_of(output: Path) -> Path:
    """The file with what the process says to stderr, beside that of stdout."""
    return output.with_name(f"{output.name}.stderr")


def kill() -> None:
    """Ends the process that calls it, as an operating system out of memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def command(*arguments: object) -> None:
    """`melayer`, as it is typed."""
    sys.argv = ["melayer", *map(str, arguments)]
    cli.main()


@contextlib.contextmanager
def together(size: int) -> Iterator[list[dict[str, str]]]:
    """The environments of so many processes that find one another, as a launcher makes them.

    The store in which they meet is held here, so that its port is nobody else's from the beginning.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    del store


def _within(
    function: Callable[..., object], arguments: tuple[object, ...], output: Path | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    if output is not None:
        for stream, path in ((1, output), (2, errors_of(output))):
            with path.open("w") as file:
                os.dup2(file.fileno(), stream)
    function(*arguments)
