"""Files that appear whole or not at all, and are on the disk before anybody hears of them: the one way to write.

Nothing that melayer did not write is replaced, see `ours`; what killed processes left unfinished is removed, see
`leftovers`.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from melayer.errors import OutputError
from melayer.runs import leftovers, ours
from melayer.runs.json_text import well_formed


@contextmanager
def staged(directory: Path, *, last: str | None = None, own: bool = False) -> Iterator[Path]:
    """A place beside the target to write files into; they are moved into `directory` when the context ends.

    A reader of `directory` sees each file as it was or as it becomes, never a part; after an exception all of them
    are as they were, and nothing is left behind.

    Args:
        directory: Made if it is missing.
        last: The name of the file that makes the others mean something; it is moved at the end.
        own: The directory is ours as a whole, whatever its files say of themselves: a run's, or a temporary one.

    Raises:
        OSError: It cannot be written. What is said of it is up to the caller, who knows what is lost.
        OutputError: Something that melayer did not write is at a file's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    leftovers.remove(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=leftovers.prefix(), ignore_cleanup_errors=True) as temporary:
        place = Path(temporary)
        yield place
        files = sorted((file for file in place.iterdir() if file.is_file()), key=lambda file: file.name == last)
        for file in files:
            _require_replaceable(file, directory / file.name, own)
        for file in files:
            sync(file)
        for file in files:
            file.replace(directory / file.name)
        sync(directory)


def _require_replaceable(file: Path, target: Path, own: bool) -> None:
    """Raises OutputError where something of others is at the target; the same bytes are nobody's loss."""
    if own and (ours.is_file(target) or not ours.is_there(target)):
        return
    if ours.is_file(target) and filecmp.cmp(file, target, shallow=False):
        return
    ours.require([target])


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A place to write files into that becomes `directory`, which is not there yet, when the context ends.

    The directory appears whole or not at all. What a process that is killed leaves behind is called
    `<directory>.*.tmp`, beside it, and removed by the next one that writes there.

    Raises:
        OSError: It cannot be written.
    """
    leftovers.remove(directory.parent)
    place = Path(tempfile.mkdtemp(prefix=leftovers.prefix(directory.name), suffix=".tmp", dir=directory.parent))
    try:
        yield place
        for path in [*place.rglob("*"), place]:
            sync(path)
        if ours.is_there(directory):
            raise OutputError(f"{directory} is there already, so it is left as it is. Give another place.")
        place.rename(directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_bytes(path: Path, content: bytes, *, own: bool = False) -> None:
    """Writes a file whole or not at all; its directory is made if it is missing.

    Args:
        path: The file.
        content: All of it.
        own: As for `staged`.

    Raises:
        OSError: It cannot be written.
        OutputError: Something that melayer did not write is there.
    """
    with staged(path.parent, own=own) as place:
        (place / path.name).write_bytes(content)


def write_text(path: Path, text: str, *, own: bool = False) -> None:
    """Writes a file of UTF-8 text whole or not at all, lone surrogates as their escapes; see `write_bytes`.

    Raises:
        OSError: It cannot be written.
        OutputError: Something that melayer did not write is there.
    """
    write_bytes(path, well_formed(text).encode("utf-8"), own=own)


def require_writable(directory: Path) -> None:
    """Makes the directory if it is missing, and tries that a file can be written in it.

    Raises:
        OSError: It cannot.
    """
    directory.mkdir(parents=True, exist_ok=True)
    leftovers.remove(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=leftovers.prefix()) as temporary:
        Path(temporary, "file").write_bytes(b"melayer")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
