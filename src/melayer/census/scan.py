"""The census of a model's activations over a corpus of any size: streamed, resumable, shared among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from melayer.census import state as scan_state
from melayer.census.counts import Census, Window
from melayer.census.observe import SITES, Place, observe, places_of
from melayer.census.result import ScanResult, conclude
from melayer.census.rounding_error import KINDS, linear_inputs, reconstruct
from melayer.census.state import State
from melayer.data.corpus import Corpus, Document, LeftOut
from melayer.data.rows import Batch, Row, batches, check_bos, kept_tokens
from melayer.errors import InputError
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.model import wiring
from melayer.model.decoder import Decoder
from melayer.model.forward import embedding_weight
from melayer.model.provenance import describe
from melayer.numerics.grids import FORMATS, Format
from melayer.runs.processes import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int | None, str], None]
"""Called with the documents done, those there are in all (None: unknown), and what to say beside them."""

_READ_AHEAD = 8  # batches whose documents are read at once, so that those of similar length go together
_DAYS = timedelta(days=30)  # one process may be slower than another by far, and is waited for as long as it lives


def scan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Corpus,
    *,
    sites: Sequence[str] = SITES,
    max_tokens: int | None = None,
    truncate: bool = False,
    bos: bool | None = None,
    limit: int | None = None,
    criterion: Criterion | None = None,
    formats: Sequence[str] = (),
    mask: WeMask | None = None,
    max_batch_tokens: int = 2048,
    store: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    parts: dict[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> ScanResult | None:
    """How large the activations of every site get over a corpus, and where: maxima, quantiles, moments, overflow.

    The corpus is streamed at constant memory. Under `torchrun` or `accelerate launch` the processes share the
    documents, and the first of them gets the result of all.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        data: A file, a directory or pattern of files, a hub id, or a `Corpus` that names columns.
        sites: Which to observe, of `SITES`; `block_out` always is, since it tells which tokens are massive.
        max_tokens: The length of a sequence; by default 512, or the model's positions if they are fewer. A longer
            document is cut into several, each of which begins anew.
        truncate: Take only the first sequence of each document.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        limit: Take only so many documents.
        criterion: What counts as massive.
        formats: Measure too what rounding the inputs of the linear maps to these loses (`int8`, `int4`, `fp8`).
            One more forward pass.
        mask: Measure the same under this mask; yet another pass.
        max_batch_tokens: Tokens in one forward pass, padding counted.
        store: A directory in which the state is kept; a scan that was stopped goes on from there, also with another
            number of processes.
        checkpoint_seconds: How often it is kept.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the documents done, how many there are (None: unknown) and a note.

    Returns:
        The result, in the first process; None in the others.

    Raises:
        InputError: The corpus or the options make no measurement, or the store holds another scan.
        OutputError: The store cannot be written.
        ProcessError: Another process has died.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.scan(model, tokenizer, "corpus.jsonl", store="out").sentence  # doctest: +SKIP
    """
    corpus = data if isinstance(data, Corpus) else Corpus(str(data))
    criterion = criterion or Criterion()
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise InputError(
            "The model is split over processes (tensor parallelism), so that some sites hold only a share of their "
            "dimensions in each. Scan it with --device-map auto instead."
        )
    check(sites, formats, mask is not None, limit)
    decoder = wiring.read(model, parts=parts)
    check_bos(tokenizer, bos)
    max_tokens = kept_tokens(max_tokens, decoder.max_positions, at_least=2)  # BOS and another one
    places = places_of(decoder, [*sites, "block_out"])
    linear = linear_inputs(decoder) if formats else ()
    group = Group.joined(model.device.type, patience=_DAYS)
    settings = _settings(decoder, corpus, places, max_tokens, truncate, bos, limit, criterion, formats, mask)
    state = _begun(None if store is None else Path(store), settings, group)
    worker = _Worker(
        decoder,
        tokenizer,
        criterion,
        places,
        linear,
        _known(formats),
        mask,
        max_tokens,
        truncate,
        bos,
        max_batch_tokens,
    )
    worker.run(
        corpus,
        state,
        group,
        limit=limit,
        store=None if store is None else Path(store),
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )
    if group.size > 1:
        whole = group.reduced(state.to_bytes(), scan_state.merged)
        if whole is None:
            return None
        state = State.from_bytes(whole)
    if not state.censuses:
        raise InputError(_nothing(corpus, state))
    return conclude(state, describe(decoder, name), criterion, tokenizer, linear, n_processes=group.size)


def check(sites: Sequence[str], formats: Sequence[str], masked: bool, limit: int | None) -> None:
    """Raises InputError for whatever is wrong before a model is loaded."""
    unknown = [site for site in sites if site not in SITES]
    if unknown or not sites:
        given = f"The site {unknown[0]!r} is not known" if unknown else "No site was given"
        raise InputError(f"{given}; expected some of {', '.join(SITES)}.")
    _known(formats)
    if masked and not formats:
        raise InputError("A mask was given, but no format whose error it may change. Add formats (--formats int8).")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 document.")


def _known(formats: Sequence[str]) -> tuple[Format, ...]:
    unknown = [format for format in formats if format not in FORMATS]
    if unknown:
        raise InputError(f"The format {unknown[0]!r} is not known; expected some of {', '.join(FORMATS)}.")
    return tuple(format for format in FORMATS if format in formats)


def _settings(
    decoder: Decoder,
    corpus: Corpus,
    places: Sequence[Place],
    max_tokens: int,
    truncate: bool,
    bos: bool | None,
    limit: int | None,
    criterion: Criterion,
    formats: Sequence[str],
    mask: WeMask | None,
) -> dict[str, Any]:
    """What the figures depend on, as JSON holds it; a scan goes on only under the same."""
    model = describe(decoder)
    data = asdict(corpus)
    if not corpus.is_of_the_hub:
        files = corpus.files
        data |= {"source": Path(corpus.source).name, "bytes": sum(path.stat().st_size for path in files)}
        data |= {"files": len(files)} if len(files) > 1 else {}
    return {
        "model": f"{model.fingerprint} in {model.dtype}",
        "data": data,
        "sites": [site for site in SITES if any(place.site == site for place in places)],
        "max_tokens": max_tokens,
        "truncate": truncate,
        "bos": bos,
        "limit": limit,
        "criterion": asdict(criterion),
        "formats": list(_known(formats)),
        "mask": None if mask is None else repr(replace(mask, made_for=None)),
    }


def _begun(store: Path | None, settings: dict[str, Any], group: Group) -> State:
    """The state to go on from: in the first process all that was kept, in the others nothing but whose it is."""
    if store is None:
        return State(settings)
    state = State(settings)
    if group.rank == 0:
        state = scan_state.read(store, settings)
        scan_state.write(store, 0, state)
        scan_state.remove_others(store, 0)
    # The first process alone reads; the others learn from it what is done, and begin files of their own.
    shares = group.gather(list(state.shares.values()))
    if group.rank:
        state.elsewhere = tuple(shares)
    return state


def _nothing(corpus: Corpus, state: State) -> str:
    if not state.n_left_out:
        return f"The corpus {corpus.source} holds no document. Give one with text in it."
    first = state.left_out[0]
    return (
        f"No document of {corpus.source} can be measured: {state.n_left_out} were left out, the first (document "
        f"{first.index}) because: {first.reason}."
    )


@dataclass(eq=False)
class _Worker:
    """What one process does."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    criterion: Criterion
    places: Sequence[Place]
    linear: Sequence[Place]
    formats: tuple[Format, ...]
    mask: WeMask | None
    max_tokens: int
    truncate: bool
    bos: bool | None
    max_batch_tokens: int
    masked: bool = False

    def run(
        self,
        corpus: Corpus,
        state: State,
        group: Group,
        *,
        limit: int | None,
        store: Path | None,
        checkpoint_seconds: float,
        progress: Progress | None,
    ) -> None:
        """Deals with every document whose turn is this process' and that nobody has dealt with yet."""
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
            if store is not None:
                scan_state.write(store, group.rank, state)

        applied = nullcontext() if self.mask is None else self.mask.apply(self.decoder.model, when=lambda: self.masked)
        with applied:
            for documents in _gathered(corpus.documents(mine, limit), 4 * _READ_AHEAD * self.max_batch_tokens):
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
            maxima = np.zeros((len(self.places), len(cut)), np.float32)
            for batch in batches(rows, max_batch_tokens=self.max_batch_tokens):
                columns = [row.index for row in batch.rows]
                maxima[:, columns] = self._batch(batch, [cut[column] for column in columns], state, category)
                say(sum(batch.lengths))
            # The windows of a document stand side by side, but may have been in several batches.
            firsts = [place for place, window in enumerate(cut) if window.number == 0]
            state.censuses[category].add_documents(np.maximum.reduceat(maxima, firsts, axis=1))

    def _batch(self, batch: Batch, windows: Sequence[Window], state: State, category: str) -> NDArray[np.float32]:
        """Adds a batch to the state; [K, windows] the largest |x| of each, infinite for NaN."""
        observed = observe(self.decoder, batch, self.places, self.criterion)
        if category not in state.censuses:
            variants = 0 if not self.formats else 1 if self.mask is None else 2
            shape = (variants, len(self.linear), len(self.formats), len(KINDS))
            widths = [len(found) for found in observed.dim_maxima]
            vocabulary = embedding_weight(self.decoder.model).shape[0]
            state.censuses[category] = Census.empty(self.places, widths, self.decoder.n_layers, vocabulary, shape)
        census = state.censuses[category]
        census.add(observed, windows, self.criterion.min_tokens)
        massive: NDArray[np.bool_] = np.asarray(observed.massive.any(axis=0))
        for variant in range(len(census.errors)):
            self.masked = variant == 1
            try:
                errors, energies = reconstruct(self.decoder, batch, self.linear, massive, self.formats)
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
        encoded = self.tokenizer(texts, add_special_tokens=self.bos is None, verbose=False)["input_ids"]
        found = []
        for document, ids in zip(documents, encoded, strict=True):
            own = [self.tokenizer.bos_token_id, *ids] if self.bos else list(ids)
            head = own[:1] if own and own[0] == self.tokenizer.bos_token_id else []
            starts = range(len(head), len(own), self.max_tokens - len(head)) or range(len(own))
            cut = [(*head, *own[start : start + self.max_tokens - len(head)]) for start in starts]
            found.append(
                [Window(document.index, number, part) for number, part in enumerate(cut[:1] if self.truncate else cut)]
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
