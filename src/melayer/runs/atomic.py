"""Files that appear whole or not at all, and are on the disk before anybody hears of them: the one way to write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(directory: Path, *, last: str | None = None) -> Iterator[Path]:
    """A place beside the target to write files into; they are moved into `directory` when the context ends.

    A reader of `directory` sees each file as it was or as it becomes, never a part; after an exception all of them
    are as they were, and nothing is left behind.

    Args:
        directory: Made if it is missing.
        last: The name of the file that makes the others mean something; it is moved at the end.

    Raises:
        OSError: It cannot be written. What is said of it is up to the caller, who knows what is lost.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".melayer-") as temporary:
        place = Path(temporary)
        yield place
        files = sorted((file for file in place.iterdir() if file.is_file()), key=lambda file: file.name == last)
        for file in files:
            sync(file)
        for file in files:
            file.replace(directory / file.name)
        sync(directory)


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A place to write files into that becomes `directory`, which is not there yet, when the context ends.

    The directory appears whole or not at all. What a process that is killed leaves behind is called
    `<directory>.*.tmp`, beside it.

    Raises:
        OSError: It cannot be written.
    """
    place = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        yield place
        for path in [*place.rglob("*"), place]:
            sync(path)
        place.rename(directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; its directory is made if it is missing.

    Raises:
        OSError: It cannot be written.
    """
    with staged(path.parent) as place:
        (place / path.name).write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text whole or not at all; its directory is made if it is missing.

    Raises:
        OSError: It cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def require_writable(directory: Path) -> None:
    """Makes the directory if it is missing, and tries that a file can be written in it.

    Raises:
        OSError: It cannot.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
