"""The texts that melayer measures when it is given none, and those in a file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from melayer.errors import InputError

if TYPE_CHECKING:
    pass


def builtin_texts() -> list[str]:
    """The varied texts that melayer measures when it is given none: prose, code, dialogue, arithmetic, a table,
    Chinese, and a single word.
    """
    directory = files("melayer.data") / "builtin"
    names = sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(".txt"))
    return [(directory / name).read_text(encoding="utf-8").rstrip("\n") for name in names]


def read_texts(path: Path, *, whole: bool = False) -> list[str]:
    """The texts in a file: one a line (blank lines are skipped), or the whole file as one.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"The text file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"The text file {path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. "
            "Convert it to UTF-8 first."
        ) from error
    text = text.removeprefix("\ufeff")
    texts = [text] if whole else [line for line in text.splitlines() if line.strip()]
    if not text.strip():
        raise InputError(f"The text file {path} is empty. Give one with text in it.")
    return texts
