"""Directories that appear whole or not at all, and which of them a stopped run goes on from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from melayer.errors import OutputError, first_line
from melayer.runs import atomic

STAGING = ".unfinished"
"""Where a run writes what is not yet whole; a leftover is worth nothing."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


class Checkpoint(NamedTuple):
    """A checkpoint of a run."""

    step: int
    path: Path


def last(out: Path) -> Checkpoint | None:
    """The newest checkpoint of a run; None where it has none."""
    found = [
        Checkpoint(int(match[1]), path)
        for path in (out.iterdir() if out.is_dir() else ())
        if path.is_dir() and (match := _CHECKPOINT.match(path.name))
    ]
    return max(found, default=None)


def clear(out: Path) -> Path:
    """The place for unfinished work, empty of what an earlier process left there."""
    staging = out / STAGING
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(staged: Path, final: Path) -> None:
    """Gives a whole directory its name, in one step; another one of that name goes away.

    What is in it is on the disk before the name is: after a power cut there is no checkpoint that is only a name.
    """
    for path in (*staged.rglob("*"), staged):
        atomic.sync(path)
    if final.exists():
        old = staged.parent / f"{final.name}.old"
        final.rename(old)
        staged.rename(final)
        shutil.rmtree(old)
    else:
        staged.rename(final)
    atomic.sync(final.parent)


def publish_files(written: Path, out: Path, last_file: str) -> None:
    """Moves files into a directory, the one that makes the others mean something at the end."""
    with atomic.staged(out, last=last_file) as staged:
        for file in written.iterdir():
            if file.is_file():
                file.rename(staged / file.name)


@contextmanager
def writing(what: str, out: Path) -> Iterator[None]:
    """Turns what a full disk makes of a write into our error, with nothing half-written left behind.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its zip writer; others are not about the disk.
        if isinstance(error, RuntimeError) and not _is_a_failed_write(error):
            raise
        shutil.rmtree(out / STAGING, ignore_errors=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        free = shutil.disk_usage(out).free if out.exists() else 0
        kept = last(out)
        good = f"The checkpoint of step {kept.step} is good" if kept else "There is no earlier checkpoint"
        raise OutputError(
            f"{what} cannot be written to {out}: {reason} ({free / 1e9:.1f} GB are free). {good}; make room and go "
            "on with --resume."
        ) from error


def _is_a_failed_write(error: RuntimeError) -> bool:
    text = str(error)
    return "PytorchStreamWriter" in text or "inline_container" in text or "unexpected pos" in text
