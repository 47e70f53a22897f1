"""What melayer wrote, told from what others did: looked at before anything is touched.

Every file of ours says in its first bytes that it is one, in its own format: JSON by `melayer_version` among its first
fields, a page by its generator, a log by the name of what it is of, tensors by a field of their header, a README by a
comment. A file that does not say so, a link, a directory, a pipe, and a file that somebody made read-only are not ours
to change: nothing is written over them, nothing added to them, and nothing is read that could wait for ever.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path

from melayer.errors import OutputError

STATE_MEMBER = "about.npy"
"""The member of an archive of arrays that says what they are."""

_HEAD = 1 << 16
_JSON = re.compile(rb'\s*\{\s*("(version|status)":\s*("[a-z]+"|\d+),\s*)?"melayer_version":\s*"\d')
_MASK = re.compile(rb'\s*\{\s*"version":\s*\d+,\s*"rate":')
_LOG = re.compile(rb'\{"[a-z_]+_of": \{')
_PAGE = re.compile(
    rb'<!doctype html>.{0,600}?(<meta name="generator" content="melayer|<title>Massive activations of )', re.DOTALL
)
_TENSORS = re.compile(rb'.{8}\{"__metadata__":\{[^{}]*"melayer_version":"', re.DOTALL)
_CARD = re.compile(rb"---\n.{0,600}?<!-- Written by melayer", re.DOTALL)


def foreign(path: Path) -> str | None:
    """Why what is at a path is not ours to change; None where it is ours, or where nothing is.

    Raises:
        OSError: It cannot be looked at.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "would be below something that is no directory" if _is_blocked(path.parent) else None
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not stat.S_ISREG(status.st_mode):
        return f"is {_kind(status.st_mode)} and no file"
    if not status.st_mode & 0o222:
        return "is read-only"
    return None if written_by_melayer(path) else "was not written by melayer"


def require(paths: Iterable[Path]) -> None:
    """Raises OutputError where something at these paths is not ours to change; says nothing where nothing is there.

    Raises:
        OSError: It cannot be looked at.
    """
    for path in paths:
        if (why := foreign(path)) is not None:
            raise OutputError(f"{path} {why}, so it is left as it is. Give another place, or move it away.")


def written_by_melayer(path: Path) -> bool:
    """Whether a regular file says that melayer wrote it."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if path.suffix == ".safetensors":
        # Those of the first version do not say it themselves; the record beside them does.
        record = path.with_suffix(".json")
        return _TENSORS.match(head) is not None or (is_file(record) and written_by_melayer(record))
    if any(form.match(head) for form in (_JSON, _MASK, _LOG, _PAGE, _CARD)):
        return True
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                return STATE_MEMBER in archive.namelist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
            return False
    return False


def is_file(path: Path) -> bool:
    """Whether a path is a regular file itself and not a link to one, which may be anybody's."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether anything is at a path, a link to nothing included."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_bytes(path: Path) -> bytes:
    """The content of a file, where it is one: a pipe that nobody writes to would be waited for without end.

    Raises:
        FileNotFoundError: There is none.
        OSError: It is no file, or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, f"it is {_kind(status.st_mode)} and no file", str(path))
    return path.read_bytes()


def _is_blocked(directory: Path) -> bool:
    """Whether something else is where a directory would be made."""
    return is_there(directory) and not directory.is_dir()


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
