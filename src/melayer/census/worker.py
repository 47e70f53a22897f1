"""What one process of a scan does: documents into sequences, sequences into batches, batches into the census."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from melayer.census import state as scan_state
from melayer.census.counts import Census, Window
from melayer.census.observe import Place, observe
from melayer.census.rounding_error import KINDS, reconstruct
from melayer.census.state import State
from melayer.data.corpus import Corpus, Document, LeftOut
from melayer.data.rows import Batch, Row, batches
from melayer.data.tokens import PIECE, Ids, TextIds
from melayer.errors import InputError, MelayerWarning
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.model.decoder import Decoder
from melayer.model.forward import embedding_weight
from melayer.numerics.grids import Format
from melayer.runs.processes import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ScanProgress = Callable[[int, int | None, str], None]
"""Called with the documents done, those there are in all (None: unknown), and what to say beside them."""

_READ_AHEAD = 8  # batches whose documents are read at once, so that those of similar length go together


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """What is observed, and how documents become sequences: the same in every process."""

    places: tuple[Place, ...]
    linear: tuple[Place, ...]
    """The linear inputs whose rounding is measured; none without formats."""
    formats: tuple[Format, ...]
    criterion: Criterion
    mask: WeMask | None
    max_tokens: int
    truncate: bool
    bos: bool | None
    limit: int | None
    max_batch_tokens: int


@dataclass(eq=False)
class Worker:
    """What one process does."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    plan: ScanPlan
    group: Group
    masked: bool = False
    """Whether the pass at hand runs under the mask."""
    own_bos: int = 0
    """Documents that begin with BOS by themselves."""
    inexact: int = 0
    """Documents that the tokenizer got in pieces, where that may change tokens."""

    def __post_init__(self) -> None:
        """How documents become tokens, and how many of those the model knows."""
        self.ids = Ids.of(self.tokenizer, self.plan.bos)
        self.vocabulary = embedding_weight(self.decoder.model).shape[0]

    def run(
        self,
        corpus: Corpus,
        state: State,
        *,
        store: Path | None,
        checkpoint_seconds: float,
        progress: ScanProgress | None,
    ) -> None:
        """Deals with every document whose turn is this process' and that nobody has dealt with yet."""
        group, limit, mask = self.group, self.plan.limit, self.plan.mask
        total = None if progress is None else corpus.count()
        total = limit if total is None else min(total, limit or total)
        began = kept = time.monotonic()
        n_tokens = reached = 0

        def mine(index: int) -> bool:
            return index % group.size == group.rank and not state.done(index)

        def say(more: int) -> None:
            nonlocal n_tokens
            n_tokens += more
            if progress is not None:
                progress(reached, total, f"{n_tokens / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")

        def keep() -> None:
            nonlocal kept
            now = time.monotonic()
            state.seconds += now - kept
            kept = now
            if store is not None and state.censuses:  # else nothing is lost
                scan_state.write(store, group.rank, state)

        applied = nullcontext() if mask is None else mask.apply(self.decoder.model, when=lambda: self.masked)
        with applied:
            for documents in _gathered(corpus.documents(mine, limit), 4 * _READ_AHEAD * self.plan.max_batch_tokens):
                self._measure(documents, state, say)
                reached = documents[-1].index + 1
                state.advance(group.rank, group.size, reached)
                say(0)
                if time.monotonic() - kept >= checkpoint_seconds:
                    keep()
        keep()
        self._say_what_was_read()

    def _measure(self, documents: Sequence[Document | LeftOut], state: State, say: Callable[[int], None]) -> None:
        """Adds some documents to the state."""
        for document in documents:
            if isinstance(document, LeftOut):
                state.leave_out(document)
        readable = [document for document in documents if isinstance(document, Document)]
        by_category: dict[str, list[tuple[int, Sequence[int]]]] = {}
        for document, ids in zip(readable, self._ids(readable), strict=True):
            if isinstance(ids, LeftOut):
                state.leave_out(ids)
            else:
                by_category.setdefault(document.category, []).append((document.index, ids))
        for category, found in by_category.items():
            # The windows of a document stand side by side, but may be in several batches and portions.
            largest: dict[int, NDArray[np.float32]] = {}
            windows = (window for index, ids in found for window in self._windows(index, ids))
            for cut in _portions(windows, 4 * _READ_AHEAD * self.plan.max_batch_tokens):
                rows = [Row(place, "", window.ids, (), 0, False) for place, window in enumerate(cut)]
                for batch in batches(rows, max_batch_tokens=self.plan.max_batch_tokens):
                    of_batch = [cut[row.index] for row in batch.rows]
                    maxima = self._batch(batch, of_batch, state, category)
                    for column, window in enumerate(of_batch):
                        known = largest.get(window.document, maxima[:, column])
                        largest[window.document] = np.maximum(known, maxima[:, column])
                    say(sum(batch.lengths))
            state.censuses[category].add_documents(np.stack(list(largest.values()), axis=1))

    def _batch(self, batch: Batch, windows: Sequence[Window], state: State, category: str) -> NDArray[np.float32]:
        """Adds a batch to the state; [K, windows] the largest |x| of each, infinite for NaN."""
        observed = observe(self.decoder, batch, self.plan.places, self.plan.criterion)
        if category not in state.censuses:
            variants = 0 if not self.plan.formats else 1 if self.plan.mask is None else 2
            shape = (variants, len(self.plan.linear), len(self.plan.formats), len(KINDS))
            widths = [len(found) for found in observed.dim_maxima]
            state.censuses[category] = Census.empty(
                self.plan.places, widths, self.decoder.n_layers, self.vocabulary, shape
            )
        census = state.censuses[category]
        census.add(observed, windows, self.plan.criterion.min_tokens)
        massive: NDArray[np.bool_] = np.asarray(observed.massive.any(axis=0))
        for variant in range(len(census.errors)):
            self.masked = variant == 1
            try:
                errors, energies = reconstruct(self.decoder, batch, self.plan.linear, massive, self.plan.formats)
            finally:
                self.masked = False
            census.errors[variant] += errors
            census.energies[variant] += energies
        return np.where(np.isnan(observed.maxima), np.inf, np.abs(observed.maxima))

    def _ids(self, documents: Sequence[Document]) -> list[Sequence[int] | LeftOut]:
        """The ids of each document, as many as are needed, or why it has none that the model knows."""
        at_most = self.plan.max_tokens if self.plan.truncate else None
        try:
            found: list[TextIds | LeftOut] = [
                *self.ids.of_texts([document.text for document in documents], at_most=at_most)
            ]
        except InputError:  # of one of them, and the others are good
            found = [self._ids_of_one(document, at_most) for document in documents]
        return [self._known(document, ids) for document, ids in zip(documents, found, strict=True)]

    def _ids_of_one(self, document: Document, at_most: int | None) -> TextIds | LeftOut:
        try:
            return self.ids.of_text(document.text, at_most=at_most)
        except InputError as error:
            return LeftOut(document.index, str(error))

    def _known(self, document: Document, found: TextIds | LeftOut) -> Sequence[int] | LeftOut:
        if isinstance(found, LeftOut):
            return found
        if not found.ids:
            return LeftOut(document.index, "gives no tokens")
        if max(found.ids) >= self.vocabulary:
            why = f"gives the token {max(found.ids)}, and the model has tokens 0 to {self.vocabulary - 1}"
            return LeftOut(document.index, why)
        self.own_bos += bool(found.own_bos)
        self.inexact += not found.exact
        return found.ids

    def _windows(self, index: int, ids: Sequence[int]) -> Iterator[Window]:
        """A document as sequences of at most `max_tokens`; where it begins with BOS, so does each."""
        bos, most = self.tokenizer.bos_token_id, self.plan.max_tokens
        head = tuple(ids[:1]) if bos is not None and ids[0] == bos and len(ids) > 1 else ()
        starts = range(len(head), len(ids), most - len(head))
        for number, start in enumerate(starts[:1] if self.plan.truncate else starts):
            yield Window(index, number, (*head, *ids[start : start + most - len(head)]))

    def _say_what_was_read(self) -> None:
        """What has to be known of how the documents became tokens."""
        if self.own_bos:
            warnings.warn(
                f"{self.own_bos:,} documents bring the begin-of-sequence token ({self.tokenizer.bos_token}) "
                "themselves, as a chat template writes it: it stays as it is, and none is added.",
                MelayerWarning,
                stacklevel=4,
            )
        if self.inexact:
            warnings.warn(
                f"{self.inexact:,} documents of more than {PIECE:,} characters were cut for the tokenizer where it may "
                "give other tokens than for the whole.",
                MelayerWarning,
                stacklevel=4,
            )


def _portions(windows: Iterable[Window], tokens: int) -> Iterator[list[Window]]:
    """Windows in lists of about so many tokens: a document may have more of them than fit into memory."""
    some: list[Window] = []
    size = 0
    for window in windows:
        some.append(window)
        size += len(window.ids)
        if size >= tokens:
            yield some
            some, size = [], 0
    if some:
        yield some


def _gathered(documents: Iterator[Document | LeftOut], characters: int) -> Iterator[list[Document | LeftOut]]:
    """Documents in lists of about so many characters."""
    some: list[Document | LeftOut] = []
    size = 0
    for document in documents:
        some.append(document)
        size += len(document.text) if isinstance(document, Document) else 1
        if size >= characters:
            yield some
            some, size = [], 0
    if some:
        yield some
