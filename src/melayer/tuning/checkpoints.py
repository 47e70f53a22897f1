"""Directories that appear whole or not at all, and which of them a stopped run goes on from."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from typing_extensions import TypedDict  # pydantic reads those of `typing` from Python 3.12 on

from melayer.errors import InputError, MelayerWarning, OutputError, first_line
from melayer.runs import atomic, ours, records
from melayer.runs.cache import sha256_of
from melayer.runs.json_text import json_text
from melayer.version import __version__

STAGING = ".unfinished"
"""Where a run writes what is not yet whole; a leftover is worth nothing."""
CHECKSUMS = "melayer_checkpoint.json"
"""The sha256 of each file of a checkpoint, so that a run never goes on from weights that are not its own."""
CLAIMED = (
    STAGING, "checkpoint-*", "log.jsonl", "report.html", "*.json", "*.safetensors", "*.bin", "*.jinja", "*.model",
    "*.tiktoken", "vocab.*", "merges.txt", "README.md",
)  # fmt: skip
"""What a run may write into its directory, as patterns: a new run begins where nothing of it is."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


class _Checksums(TypedDict):
    """What the file of them says."""

    melayer_version: str
    files: dict[str, str]


class Checkpoint(NamedTuple):
    """A checkpoint of a run."""

    step: int
    path: Path


def is_claimed(name: str) -> bool:
    """Whether a run may write a file or directory of this name."""
    return any(fnmatch(name, pattern) for pattern in CLAIMED)


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


def require_ours(out: Path) -> None:
    """Raises OutputError where the place for unfinished work is not a directory of the run's own."""
    staging = out / STAGING
    if ours.is_there(staging) and (staging.is_symlink() or not staging.is_dir()):
        raise OutputError(f"{staging} is no directory, so it is left as it is. Give another place, or move it away.")


def require_whole(checkpoint: Path) -> None:
    """Raises InputError where a file of a checkpoint is not as it was written.

    Warns:
        MelayerWarning: It has no checksums, since an older version wrote it.
    """
    todo = "Remove that directory, and the run goes on from the checkpoint before."
    said = f"{checkpoint / CHECKSUMS} cannot be read as checksums"
    try:
        kept = records.read(checkpoint / CHECKSUMS, _Checksums, said, todo)
    except FileNotFoundError:
        warnings.warn(
            f"{checkpoint} has no checksums (an older version wrote it), so that nobody can tell whether it is whole.",
            MelayerWarning,
            stacklevel=4,
        )
        return
    for name, digest in kept["files"].items():
        path = checkpoint / name
        if not path.is_file() or sha256_of(path) != digest:
            raise InputError(f"{path} is not as it was written (its checksum differs). {todo}")


def publish(staged: Path, final: Path) -> None:
    """Gives a whole directory its name, in one step; another one of that name goes away.

    What is in it is on the disk before the name is: after a power cut there is no checkpoint that is only a name.
    """
    files = {str(path.relative_to(staged)): sha256_of(path) for path in sorted(staged.rglob("*")) if path.is_file()}
    (staged / CHECKSUMS).write_text(json_text({"melayer_version": __version__, "files": files}), encoding="utf-8")
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
    """Moves files into a run's directory, the one that makes the others mean something at the end.

    Raises:
        OutputError: A file of another name than a run was expected to write is somebody's already.
    """
    ours.require(out / file.name for file in written.iterdir() if not is_claimed(file.name))
    with atomic.staged(out, last=last_file, own=True) as staged:
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
