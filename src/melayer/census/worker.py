"""What one process of a scan does: documents into sequences, sequences into batches, batches into the census."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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

    def _measure(self, documents: Sequence[Document | LeftOut], state: State, say: Callable[[int], None]) -> None:
        """Adds some documents to the state."""
        windows: dict[str, list[Window]] = {}
        for document in documents:
            if isinstance(document, LeftOut):
                state.leave_out(document)
        readable = [document for document in documents if isinstance(document, Document)]
        for document, cut in zip(readable, self._windows(readable), strict=True):
            if cut:
                windows.setdefault(document.category, []).extend(cut)
            else:
                state.leave_out(LeftOut(document.index, "gives no tokens"))
        for category, cut in windows.items():
            rows = [Row(place, "", window.ids, (), 0, False) for place, window in enumerate(cut)]
            maxima = np.zeros((len(self.plan.places), len(cut)), np.float32)
            for batch in batches(rows, max_batch_tokens=self.plan.max_batch_tokens):
                columns = [row.index for row in batch.rows]
                maxima[:, columns] = self._batch(batch, [cut[column] for column in columns], state, category)
                say(sum(batch.lengths))
            # The windows of a document stand side by side, but may have been in several batches.
            firsts = [place for place, window in enumerate(cut) if window.number == 0]
            state.censuses[category].add_documents(np.maximum.reduceat(maxima, firsts, axis=1))

    def _batch(self, batch: Batch, windows: Sequence[Window], state: State, category: str) -> NDArray[np.float32]:
        """Adds a batch to the state; [K, windows] the largest |x| of each, infinite for NaN."""
        observed = observe(self.decoder, batch, self.plan.places, self.plan.criterion)
        if category not in state.censuses:
            variants = 0 if not self.plan.formats else 1 if self.plan.mask is None else 2
            shape = (variants, len(self.plan.linear), len(self.plan.formats), len(KINDS))
            widths = [len(found) for found in observed.dim_maxima]
            vocabulary = embedding_weight(self.decoder.model).shape[0]
            state.censuses[category] = Census.empty(self.plan.places, widths, self.decoder.n_layers, vocabulary, shape)
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

    def _windows(self, documents: Sequence[Document]) -> list[list[Window]]:
        """Each document as sequences of at most `max_tokens`; where it begins with BOS, so does each."""
        if not documents:
            return []
        texts = [document.text for document in documents]
        encoded = self.tokenizer(texts, add_special_tokens=self.plan.bos is None, verbose=False)["input_ids"]
        found = []
        for document, ids in zip(documents, encoded, strict=True):
            own = [self.tokenizer.bos_token_id, *ids] if self.plan.bos else list(ids)
            head = own[:1] if own and own[0] == self.tokenizer.bos_token_id else []
            starts = range(len(head), len(own), self.plan.max_tokens - len(head)) or range(len(own))
            cut = [(*head, *own[start : start + self.plan.max_tokens - len(head)]) for start in starts]
            found.append(
                [
                    Window(document.index, number, part)
                    for number, part in enumerate(cut[:1] if self.plan.truncate else cut)
                ]
            )
        return found


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
