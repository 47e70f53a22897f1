"""The census of a model's activations over a corpus of any size: streamed, resumable, shared among processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from melayer.census import state as scan_state
from melayer.census.observe import SITES, places_of
from melayer.census.result import ScanResult, conclude
from melayer.census.rounding_error import linear_input_places
from melayer.census.state import ScanSettings, State
from melayer.census.worker import ScanPlan, ScanProgress, Worker
from melayer.data.corpus import OTHER, Corpus
from melayer.data.rows import kept_tokens
from melayer.data.tokens import check_bos
from melayer.errors import InputError, require_known
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.model.subject import Subject
from melayer.numerics.grids import FORMATS, Format
from melayer.runs.json_text import writable
from melayer.runs.processes import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DAYS = timedelta(days=30)  # one process may be slower than another by far, and is waited for as long as it lives


def scan(  # noqa: PLR0913 - a public signature
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
    progress: ScanProgress | None = None,
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
        parts: Names of parts that `wiring.read` does not find by itself.
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
    subject = Subject.of(model, tokenizer, parts=parts, name=name)
    decoder, directory = subject.decoder, None if store is None else Path(store)
    check_bos(tokenizer, bos)
    plan = ScanPlan(
        places=places_of(decoder, [*sites, "block_out"]),
        linear=linear_input_places(decoder) if formats else (),
        formats=_in_order(formats),
        criterion=criterion,
        mask=mask,
        max_tokens=kept_tokens(max_tokens, decoder.max_positions, at_least=2),  # BOS and another one
        truncate=truncate,
        bos=bos,
        limit=limit,
        max_batch_tokens=max_batch_tokens,
    )
    group = Group.joined(model.device.type, patience=_DAYS)
    state = _opened(directory, _settings(subject, corpus, plan), group)
    Worker(decoder, tokenizer, plan, group).run(
        corpus, state, store=directory, checkpoint_seconds=checkpoint_seconds, progress=progress
    )
    if group.size > 1:
        whole = group.reduced(state.to_bytes(), scan_state.merged_bytes)
        if whole is None:
            return None
        state = State.from_bytes(whole)
    if not state.censuses:
        raise InputError(corpus.nothing(state.left_out, state.n_left_out))
    return conclude(
        state, subject.info, criterion, tokenizer, plan.linear, n_processes=group.size, notes=_notes(corpus, state)
    )


def check(sites: Sequence[str], formats: Sequence[str], masked: bool, limit: int | None) -> None:
    """Raises InputError for whatever is wrong before a model is loaded."""
    if not sites:
        raise InputError(f"No site was given; expected some of {', '.join(SITES)}.")
    for site in sites:
        require_known(site, SITES, f"The site {site!r} is not known", expected="some of")
    for format in formats:
        require_known(format, FORMATS, f"The format {format!r} is not known", expected="some of")
    if masked and not formats:
        raise InputError("A mask was given, but no format whose error it may change. Add formats (--formats int8).")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 document.")


def _in_order(formats: Sequence[str]) -> tuple[Format, ...]:
    return tuple(format for format in FORMATS if format in formats)


def _settings(subject: Subject, corpus: Corpus, plan: ScanPlan) -> ScanSettings:
    """What the figures depend on, as JSON holds it; a scan goes on only under the same."""
    model = subject.info
    data = asdict(corpus)
    if corpus.category is None:
        del data["max_categories"]
    if not corpus.is_of_the_hub:
        files = corpus.files
        data |= {"source": Path(corpus.source).name, "bytes": sum(path.stat().st_size for path in files)}
        data |= {"files": len(files)} if len(files) > 1 else {}
    settings: ScanSettings = {
        "model": f"{model.fingerprint} in {model.dtype}",
        "data": data,
        "sites": [site for site in SITES if any(place.site == site for place in plan.places)],
        "max_tokens": plan.max_tokens,
        "truncate": plan.truncate,
        "bos": plan.bos,
        "limit": plan.limit,
        "criterion": asdict(plan.criterion),
        "formats": list(plan.formats),
        "mask": None if plan.mask is None else repr(replace(plan.mask, made_for=None)),
        "reading": scan_state.READING,
    }
    return cast(ScanSettings, writable(settings))  # a name in another encoding is kept as its escapes


def _opened(store: Path | None, settings: ScanSettings, group: Group) -> State:
    """The state to go on from: in the first process all that was kept, in the others nothing but whose it is."""
    if store is None:
        return State(settings)
    state = State(settings)
    if group.rank == 0:
        state = scan_state.read(store, settings)
        if state.shares:
            scan_state.write(store, 0, state)
            scan_state.remove_others(store, 0)
    # The first process alone reads; the others learn from it what is done, and begin files of their own.
    shares = group.gather(list(state.shares.values()))
    if group.rank:
        state.elsewhere = tuple(shares)
    return state


def _notes(corpus: Corpus, state: State) -> tuple[str, ...]:
    """What has to be known of how the corpus was read."""
    notes = [corpus.said]
    if OTHER in state.censuses:
        notes.append(
            f"The first {corpus.max_categories} categories in the order of the corpus have figures of their own; the "
            f"documents of all others are together as {OTHER}. --max-categories sets how many, each costs memory."
        )
    return tuple(filter(None, notes))
