"""Names for what is not finished, by which what a killed process left behind is recognised and removed.

A temporary name holds where the process ran and its number. What a process of this very machine left is removed as soon
as the process is gone; of other machines, which share a file system with this one, nobody can ask that here, so theirs
is removed when nothing in it has changed for a day.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import time
from pathlib import Path

PATIENCE = 24 * 3600.0
"""Seconds after which what another machine left is worth nothing."""

_NAME = re.compile(r"(?:.*\.)?melayer-([0-9a-f]{8})-(\d+)-[a-z0-9_]{8}(?:\.tmp)?")


def prefix(name: str = "") -> str:
    """What the name of something unfinished begins with; `tempfile` puts eight characters behind it."""
    return f"{name}.melayer-{_here()}-{os.getpid()}-"


def remove(directory: Path) -> None:
    """Removes what processes that are gone left unfinished in a directory; never that of a living one, nor others'."""
    with contextlib.suppress(OSError):  # what cannot be removed harms nobody
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None and _is_abandoned(path, match[1], int(match[2])):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path, where: str, number: int) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    if where == _here():
        return not _lives(number)
    newest = max(place.lstat().st_mtime for place in (path, *path.rglob("*")))
    return time.time() - newest > PATIENCE


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True


@functools.cache
def _here() -> str:
    """The machine since it was started, and the space in which its processes are numbered: a container has its own."""
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        known.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\0".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:8]
