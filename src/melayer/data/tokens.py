"""From a text to the ids that a model gets: exactly one beginning, and long texts in pieces that change no id.

**The beginning.** A tokenizer may put a begin-of-sequence token (BOS) in front, and so may a text that was rendered
with a chat template. It is never there twice because of that: where the text begins with what the tokenizer would add,
that is not added. What a text brings itself stays, however much of it.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from melayer.errors import InputError, border

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 16
"""Characters that are tokenised at once: a tokenizer takes some 200 bytes for each."""
_SEEN = 256  # characters on either side of a cut that have to give the same ids with and without it
_TRIED = 96  # cuts looked at before one is made that may change ids
_TRIED_WHOLE = 8  # of those that are right nearby, how many are tried on the whole piece
_PROBED = 64  # tokens of the vocabulary that are tried where words of English are not known
_WORD_ENDS = re.compile(r"(?<=\w)(?=[ \n]\w)")


@dataclass(frozen=True)
class TextIds:
    """The ids of one text."""

    ids: Sequence[int]
    own_bos: int
    """Begin-of-sequence tokens that the text itself begins with."""
    whole: bool = True
    """Whether these are all; False where it was cut at `at_most`."""
    exact: bool = True
    """Whether no piece had to be cut where that may change ids."""


@dataclass(frozen=True)
class Affixes:
    """What a tokenizer puts before and behind every text."""

    front: tuple[int, ...]
    behind: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Affixes:
        """Those of this tokenizer, read off short texts: a few words, then tokens of its own vocabulary.

        Raises:
            Exception: Whatever the tokenizer raises of them all.
        """
        refused: Exception | None = None
        own = (str(tokenizer.decode([token])) for token in range(min(_PROBED, len(tokenizer))))
        for text in itertools.chain(("a", "the", "1"), own):
            try:
                plain, whole = _call(tokenizer, text, special=False), _call(tokenizer, text, special=True)
            except Exception as error:  # noqa: BLE001 - a vocabulary without a token for what it does not know
                refused = error
                continue
            for start in range(len(whole) - len(plain) + 1):
                if plain and whole[start : start + len(plain)] == plain:
                    return cls(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
        if refused is not None:
            raise refused
        return cls((), ())

    def adds_bos(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether every text begins with the begin-of-sequence token."""
        return tokenizer.bos_token_id is not None and self.front[-1:] == (tokenizer.bos_token_id,)

    def brought(self, ids: Sequence[int]) -> bool:
        """Whether a text's own ids begin with the front."""
        return bool(self.front) and tuple(ids[: len(self.front)]) == self.front

    def around(self, ids: Sequence[int], *, ended: bool = True) -> Sequence[int]:
        """A text's ids between these; what the text brings itself is not added. Not `ended`: it goes on."""
        front = () if self.brought(ids) else self.front
        there = bool(self.behind) and tuple(ids[-len(self.behind) :]) == self.behind
        behind = self.behind if ended and not there else ()
        return [*front, *ids, *behind] if front or behind else ids


@dataclass(frozen=True)
class Ids:
    """How texts become ids: the tokenizer's own way, or with or without a begin-of-sequence token."""

    tokenizer: PreTrainedTokenizerBase
    bos: bool | None
    affixes: Affixes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> Ids:
        """With this choice of BOS.

        Raises:
            InputError: It is asked of a tokenizer without one.
        """
        check_bos(tokenizer, bos)
        with border("The tokenizer gives no tokens", "Check that its files are the model's."):
            return cls(tokenizer, bos, Affixes.of(tokenizer) if bos is None else Affixes((), ()))

    def of_text(self, text: str, *, at_most: int | None = None) -> TextIds:
        """The ids of a text.

        Args:
            text: Of any length.
            at_most: So many ids are enough: what comes later need not be looked at. What ends every text is then not
                put behind it.

        Raises:
            InputError: The tokenizer refuses it.
        """
        found = array("q")
        exact = whole = True
        for ids, sure in _pieces(self.tokenizer, text):
            found.extend(ids)
            exact &= sure
            if at_most is not None and len(found) > at_most:
                whole = False
                break
        return self._begun(found, whole=whole, exact=exact)

    def of_texts(self, texts: Sequence[str], *, at_most: int | None = None) -> list[TextIds]:
        """The ids of several texts, the short ones in one call.

        Raises:
            InputError: The tokenizer refuses one.
        """
        short = [text for text in texts if len(text) <= PIECE]
        with border("The texts cannot be tokenised", "Check that they hold what is text."):
            together = iter(_call(self.tokenizer, short, special=False) if short else ())
        return [
            self._begun(next(together), whole=True, exact=True)
            if len(text) <= PIECE
            else self.of_text(text, at_most=at_most)
            for text in texts
        ]

    def _begun(self, own: Sequence[int], *, whole: bool, exact: bool) -> TextIds:
        own_bos = self._leading_bos(own)
        ids = self.affixes.around(own, ended=whole)
        if self.bos and not own_bos:
            ids = [int(self.tokenizer.bos_token_id or 0), *own]
        return TextIds(ids, own_bos or int(self.affixes.brought(own)), whole, exact)

    def _leading_bos(self, ids: Sequence[int]) -> int:
        bos, count = self.tokenizer.bos_token_id, 0
        while bos is not None and count < len(ids) and ids[count] == bos:
            count += 1
        return count


def check_bos(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> None:
    """Raises InputError where a begin-of-sequence token is asked of a tokenizer without one."""
    if bos and tokenizer.bos_token_id is None:
        raise InputError(
            "A begin-of-sequence token was asked for, but this tokenizer has none. Leave the choice to the tokenizer."
        )


def _call(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str], *, special: bool) -> list[Any]:
    found = tokenizer(
        text if isinstance(text, str) else list(text),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(found["input_ids"])


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[list[int], bool]]:
    """The ids of a text without what the tokenizer adds, piece by piece, and whether each ends where that changes none.

    The memory that a tokenizer takes is many times a text's; of pieces it is that of one.
    """
    start = 0
    with border("A text cannot be tokenised", "Check that it holds what is text."):
        while len(text) - start > PIECE:
            begin, ids, sure = _piece(tokenizer, text, start)
            yield ids, sure
            start = begin
        yield _call(tokenizer, text[start:], special=False), True


def _piece(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> tuple[int, list[int], bool]:
    """Where the next piece begins, the ids of the one from `start` on, and whether the text has them uncut, too.

    A cut is good where the ids before it and those behind it, each by themselves, are those of both together.
    """

    def ids_of(begin: int, end: int) -> list[int]:
        return _call(tokenizer, text[begin:end], special=False)

    tries = 0
    for end, begin in _cuts(text, start + PIECE):
        before = max(start, end - _SEEN)
        if ids_of(before, end + _SEEN) != ids_of(before, end) + ids_of(begin, end + _SEEN):
            continue
        # What is right nearby may be wrong from further on: in a long run of one character the tokens of the whole
        # run stand elsewhere than those of its end.
        ids = ids_of(start, end)
        if ids_of(start, end + _SEEN) == ids + ids_of(begin, end + _SEEN):
            return begin, ids, True
        tries += 1
        if tries == _TRIED_WHOLE:
            break
    return start + PIECE, ids_of(start, start + PIECE), False


def _cuts(text: str, near: int) -> Iterator[tuple[int, int]]:
    """Where a piece may end and the next one begin, shortly before `near`: first where words end, then elsewhere.

    Tokenizers that put a space before a text get the next piece without its own.
    """
    low = max(near - PIECE // 8, 1)
    words = [match.start() for match in _WORD_ENDS.finditer(text, low, near)][: -_TRIED // 2 : -1]
    others = range(near - 1, low, -max(1, (near - low) // (_TRIED // 2)))
    for end in (*words, *others):
        yield end, end
        if text[end] == " ":
            yield end, end + 1
