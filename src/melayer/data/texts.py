"""The texts that melayer measures when it is given none, and those in a file."""

from __future__ import annotations

import os
import warnings
from importlib.resources import files
from pathlib import Path

from melayer.data.corpus import Corpus, Document, LeftOut
from melayer.data.documents import Rejected
from melayer.data.files import require_file, shown
from melayer.errors import InputError, MelayerWarning


def builtin_texts() -> list[str]:
    """The varied texts that melayer measures when it is given none: prose, code, dialogue, arithmetic, a table,
    Chinese, and a single word.
    """
    directory = files("melayer.data") / "builtin"
    names = sorted(entry.name for entry in directory.iterdir() if entry.name.endswith(".txt"))
    return [(directory / name).read_text(encoding="utf-8").rstrip("\n") for name in names]


def read_texts(path: Path, *, whole: bool = False, column: str | None = None, limit: int | None = None) -> list[str]:
    """The texts in a file, as a scan reads them: the lines of a text file, or a column of JSON, parquet or CSV.

    Blank lines are skipped. A row that cannot be used is left out, counted and named.

    Args:
        path: A file of any kind that `data.formats` tells, also compressed.
        whole: Take the file as one text, as it stands.
        column: The column with the text; by default the usual names.
        limit: Take only the first texts.

    Raises:
        InputError: The file cannot be read, or holds no text.

    Warns:
        MelayerWarning: Rows are left out, or are read in a way that has to be known.
    """
    require_file(path)
    corpus = Corpus(os.fspath(path), column=column, whole_file=whole)
    texts: list[str] = []
    left_out: list[LeftOut] = []
    for found in corpus.documents():
        if isinstance(found, Document):
            texts.append(found.text)
        else:
            left_out.append(found)
        if len(texts) == limit:
            break
    if not texts and not left_out:
        raise InputError(f"The text file {shown(path)} is empty. Give one with text in it.")
    if not texts:
        raise InputError(corpus.nothing(left_out, len(left_out)))
    rejected = Rejected(shown(path.name))
    for found in left_out:
        rejected.add(found.reason)
    for note in (corpus.said, _old_ends(path, texts, whole), rejected.note):
        if note:
            warnings.warn(note, MelayerWarning, stacklevel=2)
    return texts


def _old_ends(path: Path, texts: list[str], whole: bool) -> str:
    """What is said where only carriage returns stand between what may have been lines."""
    if whole or len(texts) > 1 or "\r" not in texts[0]:
        return ""
    return f"{shown(path.name)} has carriage returns and no line feed, so it is one text: a line ends at a line feed."
