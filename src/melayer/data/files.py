"""A file as a stream of bytes, whatever it was compressed with; a path that is no file is refused before it is read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from melayer.errors import InputError, border, reason

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BZIP2, _XZ = b"BZh", b"\xfd7zXZ\0"
_KINDS_OF_PATH = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
EXTRA = "pip install 'melayer[data]'"
"""What brings pyarrow and datasets, which parquet, .zst and the hub's data sets need."""


def is_there(path: Path) -> bool:
    """Whether something is at a path; a name that is too long or forbidden is none."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether a path is a regular file that can be looked at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def is_link(path: Path) -> bool:
    """Whether a path is a link, also one that leads nowhere."""
    try:
        return stat.S_ISLNK(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def require_file(path: Path) -> None:
    """Raises InputError unless a path is a regular file: a pipe that nobody writes is waited for for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(
            f"The file {shown(path)} cannot be read: {reason(error)}. Check its name and its rights."
        ) from error
    for is_of, kind in _KINDS_OF_PATH:
        if is_of(mode):
            raise InputError(f"The file {shown(path)} cannot be read: it is {kind}. Give a file that holds the data.")


def opened(path: Path) -> IO[bytes]:
    """The content of a file; what is compressed (gzip, bzip2, xz, Zstandard) is told by its first bytes, not its name.

    Raises:
        InputError: It is no regular file, cannot be opened, or needs a library that is not installed.
    """
    require_file(path)
    with border(f"The file {shown(path)} cannot be read", "Check its rights."):
        raw = path.open("rb")
    with border(f"The file {shown(path)} cannot be read", "Copy or download it again."):
        try:
            return _decompressed(raw, path)
        except BaseException:
            raw.close()
            raise


def _decompressed(raw: io.BufferedReader, path: Path) -> IO[bytes]:
    first = raw.peek(8)[:8]
    if first.startswith(_GZIP):
        return io.BufferedReader(_Owning(gzip.GzipFile(fileobj=raw), raw), 1 << 20)  # type: ignore[arg-type]
    if first.startswith(_BZIP2):
        return io.BufferedReader(_Owning(bz2.BZ2File(raw), raw), 1 << 20)
    if first.startswith(_XZ):
        return io.BufferedReader(_Owning(lzma.LZMAFile(raw), raw), 1 << 20)
    if first.startswith(_ZSTANDARD):
        raw.close()
        return _zstandard(path)
    return raw


class _Owning(io.RawIOBase):
    """A decompressing file that closes the one that it reads."""

    def __init__(self, file: IO[bytes], under: IO[bytes]) -> None:
        self._file, self._under = file, under

    def readable(self) -> bool:
        """As of any file to read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes."""
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Closes both."""
        if not self.closed:
            self._file.close()
            self._under.close()
        super().close()


def _zstandard(path: Path) -> IO[bytes]:
    pyarrow = require_pyarrow(f"{shown(path)} is compressed with Zstandard")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)


def require_pyarrow(said: str) -> Any:
    """pyarrow, which parquet and Zstandard need and which the core goes without.

    Raises:
        InputError: It is not installed; the message says how to get it.
    """
    return _required("pyarrow", lambda: __import__("pyarrow"), said)


def require_datasets(said: str) -> Any:
    """datasets, which reads what is on the hub.

    Raises:
        InputError: It is not installed; the message says how to get it.
    """
    return _required("datasets", lambda: __import__("datasets"), said)


def _required(name: str, imported: Callable[[], Any], said: str) -> Any:
    try:
        return imported()
    except ImportError as error:
        raise InputError(f"{said}, which needs {name}, and that is not installed. Get it with: {EXTRA}") from error


def shown(path: Path | str) -> str:
    """A path as it can be printed anywhere: what is not UTF-8 is escaped, and what is long is cut."""
    text = printable(os.fspath(path))
    return text if len(text) <= 200 else f"{text[:99]}…{text[-100:]}"


def printable(text: str) -> str:
    """A text whose lone surrogates are escaped, so that it can be written as UTF-8 and as JSON."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
