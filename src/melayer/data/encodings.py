"""How the bytes of a file become text: by the mark at its beginning, and without one as UTF-8."""

from __future__ import annotations

import codecs
import io
from dataclasses import dataclass
from typing import IO, Any

from melayer.errors import InputError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BAD = "melayer-bad-character"
_CHUNK = 1 << 20
CONVERT = "Convert it to UTF-8 first: iconv -f ENCODING -t UTF-8"
"""What to do about a file in another encoding."""


@dataclass(frozen=True)
class Encoding:
    """How a file is encoded."""

    name: str
    mark: bytes = b""
    """The byte order mark that it begins with."""


def encoding_of(beginning: bytes, name: str) -> Encoding:
    """The encoding that a file's mark names; UTF-8 without one.

    Args:
        beginning: Of the file, a few thousand bytes.
        name: What to call it.

    Raises:
        InputError: It has no mark, and its zero bytes stand as they do in UTF-16 or UTF-32.
    """
    for mark, encoding in _MARKS:
        if beginning.startswith(mark):
            return Encoding(encoding, mark)
    encoding_without_mark = _unmarked(beginning[:4096])
    if encoding_without_mark is not None:
        raise InputError(
            f"{name} looks like {encoding_without_mark} without a byte order mark, which cannot be told for certain. "
            f"Convert it to UTF-8 first: iconv -f {encoding_without_mark} -t UTF-8"
        )
    return Encoding("utf-8")


def as_utf8(file: IO[bytes], encoding: Encoding) -> IO[bytes]:
    """The content of a file in UTF-8, without its mark.

    What is not of the file's encoding becomes bytes that are not UTF-8, so that it costs the line in which it stands
    and no other.
    """
    file.read(len(encoding.mark))
    if encoding.name == "utf-8":
        return file
    return io.BufferedReader(_Transcoded(file, encoding.name), _CHUNK)


def _unmarked(beginning: bytes) -> str | None:
    """The encoding in which one of two bytes, or three of four, are zero, as they are of ASCII; None for others."""
    quarter = len(beginning) // 4
    if quarter < 2:
        return None
    shares = [beginning[place : 4 * quarter : 4].count(0) / quarter for place in range(4)]
    shape = "".join("0" if share >= 0.7 else "x" if share <= 0.3 else "?" for share in shares)
    return {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}.get(shape)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error(_BAD, _replaced)


class _Transcoded(io.RawIOBase):
    """The content of a file of another encoding, in UTF-8; a lone surrogate stands for what is none of it."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)(errors=_BAD)
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        """As of any file to read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes."""
        while not self._ready and not self._ended:
            chunk = self._file.read(_CHUNK)
            self._ended = not chunk
            self._ready = self._decoder.decode(chunk, final=self._ended).encode("utf-8", errors="surrogatepass")
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        """Closes the file too."""
        if not self.closed:
            self._file.close()
        super().close()
