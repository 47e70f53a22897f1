"""Where the massive activation emerges: the ME layer, its stages, and where it is erased again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from melayer import architecture, hooks
from melayer.architecture import Decoder, Site
from melayer.errors import InputError
from melayer.hooks import Point
from melayer.inputs import Batch, Row, batches, builtin_texts, encode, visible
from melayer.provenance import ModelInfo, describe
from melayer.statistics import MAP_TOKENS, Summary, stack, summarise
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Emergence = Literal["single", "staged", "gradual", "none"]
Run = Callable[["PreTrainedModel", Batch], None]
"""Runs a batch through the model for those who watch."""
Progress = Callable[[int, int], None]
"""Called with the tokens done and the tokens in all."""

STAGE_SHARE = 0.10
"""A block that adds at least this share of the peak state is a stage; one that takes it away erases."""
WHOLE_SHARE = 0.90
"""What one block (single) or two or three stages together (staged) must add."""


@dataclass(frozen=True)
class Criterion:
    """What counts as massive, and when a block is the ME layer.

    The thresholds of a massive activation are those of Sun et al. 2024 (arXiv:2402.17762); persistence and majority
    make "the first block after which it is there" exact (arXiv:2605.08504 counts that block as the ME layer).
    """

    min_abs: float = 100.0
    """|h| must be larger than this."""
    min_ratio: float = 1000.0
    """|h| must be larger than this many times the median |h| of its sequence at its block."""
    persistence: float = 0.25
    """The criterion must go on holding for at least this share of the blocks, the ME layer counted."""
    majority: float = 0.5
    """It must hold in more than this share of the sequences."""
    min_tokens: int = 8
    """A shorter sequence has too few ordinary tokens for its median to mean anything, and does not vote."""

    def __post_init__(self) -> None:
        """Refuse thresholds that no activation can meet or miss."""
        for name in ("min_abs", "min_ratio"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected a number of at least 0.")
        for name in ("persistence", "majority"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1.")


@dataclass(frozen=True)
class BlockRow:
    """The largest |h| at a block's output over all sequences, and what it stands against in its own sequence."""

    layer: int
    max_abs: float | None
    """None where the output is not finite: a maximum over the rest would hide that."""
    sequence: int
    token_index: int
    token: str
    dim: int
    median_abs: float | None
    ratio: float | None
    top_norm: float | None
    """The norm of the token that holds the largest |h|."""
    others_norm: float | None
    """The median norm of the other tokens of that sequence."""
    n_massive: int
    """Massive scalars over all sequences."""
    n_holding: int
    """Sequences with at least one of them, among those that vote."""
    n_non_finite: int
    """Tokens that hold a NaN or an infinity, over all sequences."""


@dataclass(frozen=True)
class MassiveScalar:
    """One scalar that meets the criterion."""

    layer: int
    sequence: int
    token_index: int
    token: str
    dim: int
    value: float


@dataclass(frozen=True)
class Stage:
    """A block that adds a share of the massive token's peak state, along its direction."""

    layer: int
    share: float
    attn_share: float | None
    """The part that attention writes; None where the block has no softmax attention."""
    ffn_share: float | None
    """The part that the FFN writes; None where the block has none."""


@dataclass(frozen=True)
class SequenceRow:
    """What happened in one sequence."""

    index: int
    text: str
    n_tokens: int
    n_dropped: int
    first_token: str
    has_bos: bool
    votes: bool
    """Whether it is long enough for the criterion to mean something."""
    holds: bool | None
    """Whether the criterion holds at the ME layer; None if there is no ME layer."""
    massive_token_index: int | None
    massive_token: str | None
    emergence: Emergence | None


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or infinity, in the order in which the model computes."""

    layer: int | None
    """The block whose output holds it; None for the embedding."""
    sequence: int
    token_index: int
    dim: int
    value: str


@dataclass(frozen=True, eq=False)
class Trace:
    """The course of one token through the blocks, for pictures; not part of `to_dict()`."""

    sequence: int
    token_index: int
    token: str
    states: NDArray[np.float32]
    """[n_layers, d_model] its state at each block's output."""
    token_max: NDArray[np.float32]
    """[n_layers, tokens] the largest |h| of each of the first tokens of its sequence."""
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class LocateResult:
    """What `locate` found. Layers are 0-based throughout."""

    model: ModelInfo
    criterion: Criterion
    settings: dict[str, Any]
    me_layer: int | None
    emergence: Emergence
    stages: tuple[Stage, ...]
    erased_at: tuple[int, ...]
    """Empty, and null in `to_dict()`, where the run was stopped before the last block."""
    peak_layer: int | None
    """Where the massive token's norm peaks."""
    shares: tuple[Stage, ...]
    """The share of every block, mean over the sequences in which the criterion holds; empty if it holds in none."""
    embedding_share: float | None
    """The share that is there before block 0; with `shares` up to the peak it adds up to 1."""
    blocks: tuple[BlockRow, ...]
    embedding_max_abs: float | None
    massive: tuple[MassiveScalar, ...]
    sequences: tuple[SequenceRow, ...]
    non_finite: NonFinite | None
    notes: tuple[str, ...]
    trace: Trace | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": {"criterion": asdict(self.criterion), **self.settings},
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "emergence": self.emergence,
            "stages": [asdict(stage) for stage in self.stages],
            "erased_at": list(self.erased_at) if self.complete else None,
            "peak_layer": self.peak_layer,
            "shares": [asdict(stage) for stage in self.shares],
            "embedding_share": self.embedding_share,
            "blocks": [asdict(row) for row in self.blocks],
            "embedding_max_abs": self.embedding_max_abs,
            "massive": [asdict(scalar) for scalar in self.massive],
            "sequences": [asdict(row) for row in self.sequences],
            "non_finite": asdict(self.non_finite) if self.non_finite else None,
            "notes": list(self.notes),
        }

    @property
    def complete(self) -> bool:
        """Whether every block was run. `locate_frugal` can stop before: then `blocks` ends where it stopped."""
        return len(self.blocks) == self.model.n_layers

    @property
    def massive_above(self) -> float:
        """What a token's largest |h| at the ME layer's output must exceed to be massive, as one constant.

        The larger of `min_abs` and `min_ratio` medians of that block: a median over the tokens at hand would let one
        depend on those beside and behind it.
        """
        median = 0.0 if self.me_layer is None else self.blocks[self.me_layer].median_abs or 0.0
        return float(max(self.criterion.min_abs, self.criterion.min_ratio * median))

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        if self.non_finite is not None:
            where = "the embedding" if self.non_finite.layer is None else f"the output of block {self.non_finite.layer}"
            return (
                f"Non-finite activations in {self.model.dtype}: the first ({self.non_finite.value}) is in {where}, "
                f"text {self.non_finite.sequence}, token {self.non_finite.token_index}, dimension "
                f"{self.non_finite.dim}; nothing that depends on it was judged."
            )
        if self.me_layer is None:
            strongest = max(self.blocks, key=lambda row: row.ratio or 0.0)
            if not any(row.n_massive for row in self.blocks):
                return (
                    "No massive activation was found: the largest ratio to the median is "
                    f"{strongest.ratio or 0:,.0f} (block {strongest.layer}, |h| = {strongest.max_abs or 0:,.1f}), "
                    f"the criterion asks for {self.criterion.min_ratio:,.0f} and |h| > {self.criterion.min_abs:,.0f}."
                )
            return (
                f"There is no ME layer: the criterion holds in places (most strongly after block {strongest.layer}), "
                "but nowhere in enough sequences for long enough."
            )
        row = self.blocks[self.me_layer]
        how = {
            "single": "this one block creates it",
            "staged": f"it is created in stages (blocks {', '.join(str(stage.layer) for stage in self.stages)})",
            "gradual": "it grows gradually over many blocks",
            "none": "its growth could not be followed",
        }[self.emergence]
        erased = f", and it is erased at {_blocks(self.erased_at)}" if self.erased_at else ""
        if not self.complete:
            erased = f"; nothing behind block {self.blocks[-1].layer} was run"
        # A stream of mostly zeros has a median of 0, and no ratio to it.
        ratio = "the median is 0" if row.ratio is None else f"{row.ratio:,.0f} times the median"
        return (
            f"The ME layer is block {self.me_layer} of {self.model.n_layers} (0-based): there token "
            f"{row.token_index} (“{visible(row.token)}”) reaches |h| = {row.max_abs:,.0f} in dimension {row.dim}, "
            f"{ratio}; {how}{erased}."
        )


def _blocks(layers: Sequence[int]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def locate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_listed: int = 16,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> LocateResult:
    """Where the massive activation of a model emerges, grows and is erased.

    One pass over the texts keeps summaries of every block's output. A second one follows the massive tokens
    alone: a token sees only what is before it, so the rest of its sequence is left out.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to run; by default a small varied set that melayer brings along.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: Thresholds, persistence and majority.
        max_listed: How many massive scalars to list for each sequence and block; all are counted.
        max_batch_tokens: Tokens in one forward pass, padding counted.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Returns:
        The result, on the host. "None found" is a result.

    Raises:
        InputError: The texts or the options make no measurement.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> result = melayer.locate(model, tokenizer, texts=["The sky is clear today."])  # doctest: +SKIP
        >>> result.me_layer, result.emergence  # doctest: +SKIP
        (11, 'single')
    """
    criterion = criterion or Criterion()
    if max_listed < 1:
        raise InputError(f"max_listed is {max_listed}; expected at least 1.")
    decoder = architecture.read(model, parts=parts)
    rows = encode(
        tokenizer,
        builtin_texts() if texts is None else texts,
        max_tokens=max_tokens,
        max_positions=decoder.max_positions,
        bos=bos,
    )
    summaries = summaries_of(
        decoder, rows, criterion, k=max_listed, max_batch_tokens=max_batch_tokens, progress=progress
    )
    return conclude(
        decoder,
        rows,
        summaries,
        criterion,
        describe(decoder, name),
        settings_of(rows, texts, max_tokens, bos),
        lambda targets: courses(decoder, targets, max_batch_tokens=max_batch_tokens),
    )


# --- the first pass: summaries of every block --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SequenceSummary:
    """What is kept of one row: [n_layers + 1, ...], the embedding output first."""

    values: NDArray[np.float32]
    tokens: NDArray[np.int64]
    dims: NDArray[np.int64]
    median_abs: NDArray[np.float32]
    n_massive: NDArray[np.int64]
    top_norm: NDArray[np.float32]
    others_norm: NDArray[np.float32]
    n_non_finite: NDArray[np.int64]
    token_max: NDArray[np.float32]


def summaries_of(
    decoder: Decoder,
    rows: Sequence[Row],
    criterion: Criterion,
    *,
    k: int,
    max_batch_tokens: int,
    progress: Progress | None = None,
    around: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
    made: Callable[[int, Summary], None] = lambda place, summary: None,
    run: Run | None = None,
) -> dict[int, SequenceSummary]:
    """The summary of each row at the embedding output and at every block's output, by the row's index.

    Args:
        decoder: The model's parts.
        rows: The sequences to run.
        criterion: Its thresholds decide what is counted as massive.
        k: How many of the largest entries to keep for each row and block.
        max_batch_tokens: Tokens in one forward pass.
        progress: Called with the tokens done and the tokens in all.
        around: A context for each batch's forward pass, where another measurement listens in.
        made: Called with each summary once it is there, and its place: 0 for the embedding, then block by block.
        run: Runs a batch, in place of `forward`. Where it stops before the last block, so do the summaries.
    """
    points: list[tuple[int, Point]] = [(0, decoder.embedding_output)]
    points += [(block.layer + 1, block.sites["block_out"]) for block in decoder.blocks]
    total, done = sum(map(len, rows)), 0
    found: dict[int, SequenceSummary] = {}
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        seen: dict[int, Summary] = {}

        def see(layer: int, hidden: torch.Tensor, lengths: Sequence[int] = batch.lengths, into: Any = seen) -> None:
            into[layer] = summarise(hidden, lengths, min_abs=criterion.min_abs, min_ratio=criterion.min_ratio, k=k)
            made(layer, into[layer])

        with around(batch), hooks.watch(points, see):
            (run or forward)(decoder.model, batch)
        stacked = stack([seen[layer] for layer in range(len(seen))]).cpu()
        for place, row in enumerate(batch.rows):
            found[row.index] = SequenceSummary(
                **{key: getattr(stacked, key)[:, place].numpy() for key in SequenceSummary.__dataclass_fields__}
            )
        done += sum(batch.lengths)
        if progress is not None:
            progress(done, total)
    return found


def forward(model: PreTrainedModel, batch: Batch) -> None:
    """Runs a batch through the model for those who watch; nothing is returned and nothing is learnt."""
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate moves the inputs where they are needed
        device = torch.device("cpu")
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    # One row of logits is enough: nothing here looks at them, and all of them can outweigh the model.
    with hooks.measuring(model):
        model(**inputs, use_cache=False, logits_to_keep=1)


# --- the second pass: the massive tokens alone -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Course:
    """One token's way through the blocks; NaN where a block does not have the site."""

    block_in: NDArray[np.float32]
    """[n_layers, d_model]"""
    attn_out: NDArray[np.float32]
    ffn_out: NDArray[np.float32]
    block_out: NDArray[np.float32]


FOLLOWED: tuple[Site, ...] = ("block_in", "attn_out", "ffn_out", "block_out")


def followed_points(decoder: Decoder) -> list[tuple[tuple[int, Site], Point]]:
    """Where a token's course can be seen, each with its block and site."""
    return [
        ((block.layer, site), block.sites[site]) for block in decoder.blocks for site in FOLLOWED if site in block.sites
    ]


def courses(
    decoder: Decoder, targets: Mapping[int, tuple[Row, int]], *, max_batch_tokens: int, run: Run | None = None
) -> Iterable[tuple[list[int], Course]]:
    """For each distinct prefix that ends in a target token: the sequences that have it, and its course.

    Args:
        decoder: The model's parts.
        targets: The token to follow in each row, by the row's index.
        max_batch_tokens: Tokens in one forward pass.
        run: Runs a batch, in place of `forward`.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for sequence, (row, token) in targets.items():
        sharing.setdefault(row.ids[: token + 1], []).append(sequence)
    prefixes = [
        Row(index=place, text="", ids=ids, tokens=(), n_dropped=0, has_bos=False) for place, ids in enumerate(sharing)
    ]
    for batch in batches(prefixes, max_batch_tokens=max_batch_tokens):
        seen: dict[tuple[int, Site], torch.Tensor] = {}
        ends = torch.tensor(batch.lengths) - 1

        def see(key: tuple[int, Site], hidden: torch.Tensor, ends: torch.Tensor = ends, into: Any = seen) -> None:
            places = torch.arange(len(ends), device=hidden.device)
            into[key] = hidden[places, ends.to(hidden.device)].float()

        with hooks.watch(followed_points(decoder), see):
            (run or forward)(decoder.model, batch)
        states = {key: state.cpu().numpy() for key, state in seen.items()}
        for place, prefix in enumerate(batch.rows):
            yield sharing[prefix.ids], course_of({key: state[place] for key, state in states.items()})


def course_of(states: Mapping[tuple[int, Site], NDArray[np.float32]]) -> Course:
    """The course of one token.

    Args:
        states: [d_model] its state at each block and site, as far as the run went.
    """
    n_layers = 1 + max(layer for layer, _ in states)
    absent = np.full_like(states[0, "block_in"], np.nan)
    return Course(
        **{site: np.stack([states.get((layer, site), absent) for layer in range(n_layers)]) for site in FOLLOWED}
    )


Follow = Callable[[Mapping[int, tuple[Row, int]]], Iterable[tuple[list[int], Course]]]
"""From the token to follow in each sequence to courses, each with the sequences that have it."""


def shares_of(course: Course) -> tuple[int, float, NDArray[np.float64]]:
    """The peak layer, the embedding's share, and [n_layers, 3] the shares of each block, its attention, its FFN.

    The share of a block is <block_out - block_in, u> / <peak state, u>, u the unit vector of the state where its
    norm peaks. Up to the peak they add up to 1 with the embedding's.
    """
    states = course.block_out.astype(np.float64)
    peak = int(np.linalg.norm(states, axis=1).argmax())
    direction = states[peak] / np.linalg.norm(states[peak])
    whole = states[peak] @ direction
    writes = [states - course.block_in, course.attn_out, course.ffn_out]
    return (
        peak,
        float(course.block_in[0] @ direction / whole),
        np.stack([np.asarray(write, dtype=np.float64) @ direction / whole for write in writes], axis=1),
    )


def classify(shares: Sequence[float]) -> Emergence:
    """`single`: one block adds 90 %; `staged`: two or three add 10 % each and 90 % together; else `gradual`."""
    stages = [share for share in shares if share >= STAGE_SHARE]
    if any(share >= WHOLE_SHARE for share in stages):
        return "single"
    if 2 <= len(stages) <= 3 and sum(stages) >= WHOLE_SHARE:
        return "staged"
    return "gradual"


# --- conclusions --------------------------------------------------------------------------------------------------


def find_me_layer(holding: NDArray[np.bool_], criterion: Criterion, n_layers: int | None = None) -> int | None:
    """The first block at which the criterion holds in a majority of the sequences, and goes on doing so.

    Args:
        holding: [n_sequences, blocks run] whether each sequence holds a massive scalar at each block's output.
        criterion: Its majority and persistence.
        n_layers: The model's blocks, where not all of them were run; what is found then no later block can change.
    """
    n_sequences, n_run = holding.shape
    if n_sequences == 0:
        return None
    carried = holding.mean(axis=0) > criterion.majority
    needed = max(1, math.ceil(criterion.persistence * (n_layers or n_run)))
    for layer in range(n_run - needed + 1):
        if carried[layer : layer + needed].all():
            return layer
    return None


def voting(rows: Sequence[Row], criterion: Criterion) -> list[int]:
    """The sequences that decide on the ME layer: the long enough ones, or all where there are none."""
    return [row.index for row in rows if len(row) >= criterion.min_tokens] or [row.index for row in rows]


def settings_of(
    rows: Sequence[Row], texts: Sequence[str] | None, max_tokens: int | None, bos: bool | None
) -> dict[str, Any]:
    """What a result says about how it came to be."""
    return {
        "texts": "built-in" if texts is None else "given",
        "n_sequences": len(rows),
        "n_tokens": sum(map(len, rows)),
        "max_tokens": max_tokens,
        "bos": {"asked": bos, "sequences_with_bos": sum(row.has_bos for row in rows)},
        "stage_share": STAGE_SHARE,
        "whole_share": WHOLE_SHARE,
        "layers_counted_from": 0,
    }


def conclude(
    decoder: Decoder,
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    criterion: Criterion,
    model: ModelInfo,
    settings: Mapping[str, Any],
    follow: Follow,
    more_notes: Sequence[str] = (),
) -> LocateResult:
    """The result, from the summaries and from the courses of the massive tokens.

    Args:
        decoder: The model's parts.
        rows: The sequences that were run.
        summaries: Of each row, as far as the run went.
        criterion: Thresholds, persistence and majority.
        model: What the result says about the model.
        settings: What it says about how it came to be.
        follow: Gives the courses of the tokens that it is asked for.
        more_notes: Put behind its own notes.
    """
    notes = []
    voters = voting(rows, criterion)
    if all(len(row) < criterion.min_tokens for row in rows):
        notes.append(
            f"The criterion is not meaningful here: every text has fewer than {criterion.min_tokens} tokens, and the "
            "median needs ordinary tokens beside the massive one. Give longer texts."
        )
    elif len(voters) < len(rows):
        notes.append(
            f"Too short to vote on the ME layer (fewer than {criterion.min_tokens} tokens): "
            f"{len(rows) - len(voters)} of {len(rows)} texts."
        )
    dropped = [row.index for row in rows if row.n_dropped]
    if dropped:
        notes.append(f"Cut to {max(map(len, rows))} tokens: {len(dropped)} of {len(rows)} texts.")
    holding = np.stack([summaries[row.index].n_massive[1:] > 0 for row in rows])
    finite = np.stack([summaries[row.index].n_non_finite[1:] == 0 for row in rows])
    holding &= finite
    me_layer = find_me_layer(holding[voters], criterion, decoder.n_layers)
    n_run = holding.shape[1]
    targets = {}
    if me_layer is not None:
        targets = {
            row.index: (row, int(summaries[row.index].tokens[me_layer + 1, 0]))
            for row in rows
            if holding[row.index, me_layer]
        }
    non_finite = _first_non_finite(rows, summaries)
    trace, followed = _follow(follow, rows, summaries, targets, drawn=non_finite is None)
    followed = {sequence: found for sequence, found in followed.items() if sequence in voters}
    mean = np.mean([shares for _, _, shares in followed.values()], axis=0) if followed else np.zeros((0, 3))
    shares = tuple(
        Stage(layer, *(None if np.isnan(part) else float(part) for part in mean[layer]))  # type: ignore[arg-type]
        for layer in range(len(mean))
    )
    peaks = [peak for peak, _, _ in followed.values()]
    emergences = {sequence: classify(shares[:, 0].tolist()) for sequence, (_, _, shares) in followed.items()}
    differing = sorted(set(emergences.values()))
    if len(differing) > 1:
        notes.append(f"The texts differ in how it emerges ({', '.join(differing)}); the shares are means over them.")
    return LocateResult(
        model=model,
        criterion=criterion,
        settings=dict(settings),
        me_layer=me_layer,
        emergence=classify(mean[:, 0].tolist()) if followed else "none",
        stages=tuple(stage for stage in shares if stage.share >= STAGE_SHARE),
        erased_at=tuple(stage.layer for stage in shares if stage.share <= -STAGE_SHARE and n_run == decoder.n_layers),
        peak_layer=max(set(peaks), key=peaks.count) if peaks else None,
        shares=shares,
        embedding_share=float(np.mean([share for _, share, _ in followed.values()])) if followed else None,
        blocks=tuple(_block_row(layer, rows, summaries, holding[voters]) for layer in range(n_run)),
        embedding_max_abs=_finite(max(abs(summary.values[0, 0]) for summary in summaries.values())),
        massive=tuple(_massive(rows, summaries, holding, criterion)),
        sequences=tuple(
            SequenceRow(
                index=row.index,
                text=row.text if len(row.text) <= 80 else row.text[:79] + "…",
                n_tokens=len(row),
                n_dropped=row.n_dropped,
                first_token=row.tokens[0],
                has_bos=row.has_bos,
                votes=row.index in voters,
                holds=None if me_layer is None else bool(holding[row.index, me_layer]),
                massive_token_index=targets[row.index][1] if row.index in targets else None,
                massive_token=row.tokens[targets[row.index][1]] if row.index in targets else None,
                emergence=emergences.get(row.index),
            )
            for row in rows
        ),
        non_finite=non_finite,
        notes=(*notes, *more_notes),
        trace=trace,
    )


def _follow(
    follow: Follow,
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    targets: Mapping[int, tuple[Row, int]],
    *,
    drawn: bool,
) -> tuple[Trace | None, dict[int, tuple[int, float, NDArray[np.float64]]]]:
    """The course to draw, and for each sequence of `targets` its peak and shares."""
    if targets:
        shown = min(targets)
    else:
        # Nothing massive to follow: draw the token with the largest value, so that its absence can be seen.
        shown = max(summaries, key=lambda index: np.abs(np.nan_to_num(summaries[index].values[1:, 0])).max())
    summary = summaries[shown]
    highest = int(np.abs(np.nan_to_num(summary.values[1:, 0])).argmax())
    wanted = dict(targets) or ({shown: (rows[shown], int(summary.tokens[highest + 1, 0]))} if drawn else {})
    trace, followed = None, {}
    for sequences, course in follow(wanted):
        # A course that ends in NaN has no peak; the result names where it ends.
        if targets and np.isfinite(course.block_out).all():
            found = shares_of(course)
            followed.update(dict.fromkeys(sequences, found))
        if shown in sequences:
            row, token = wanted[shown]
            trace = Trace(
                sequence=shown,
                token_index=token,
                token=row.tokens[token],
                states=course.block_out,
                token_max=summary.token_max[1:, : min(len(row), MAP_TOKENS)],
                tokens=row.tokens[:MAP_TOKENS],
            )
    return trace, followed


def _block_row(
    layer: int, rows: Sequence[Row], summaries: Mapping[int, SequenceSummary], holding: NDArray[np.bool_]
) -> BlockRow:
    at = layer + 1

    def size(row: Row) -> float:
        value = abs(float(summaries[row.index].values[at, 0]))
        return math.inf if math.isnan(value) else value

    row = max(rows, key=size)
    summary = summaries[row.index]
    token = int(summary.tokens[at, 0])
    max_abs, median = _finite(abs(summary.values[at, 0])), _finite(summary.median_abs[at])
    return BlockRow(
        layer=layer,
        max_abs=max_abs,
        sequence=row.index,
        token_index=token,
        token=row.tokens[token],
        dim=int(summary.dims[at, 0]),
        median_abs=median,
        ratio=max_abs / median if max_abs is not None and median else None,
        top_norm=_finite(summary.top_norm[at]),
        others_norm=_finite(summary.others_norm[at]),
        n_massive=sum(int(s.n_massive[at]) for s in summaries.values() if s.n_non_finite[at] == 0),
        n_holding=int(holding[:, layer].sum()),
        n_non_finite=sum(int(s.n_non_finite[at]) for s in summaries.values()),
    )


def _massive(
    rows: Sequence[Row],
    summaries: Mapping[int, SequenceSummary],
    holding: NDArray[np.bool_],
    criterion: Criterion,
) -> Iterable[MassiveScalar]:
    for layer in range(holding.shape[1]):
        for row in rows:
            if not holding[row.index, layer]:
                continue
            summary = summaries[row.index]
            at = layer + 1
            bound = max(criterion.min_abs, criterion.min_ratio * float(summary.median_abs[at]))
            for value, token, dim in zip(summary.values[at], summary.tokens[at], summary.dims[at], strict=True):
                if abs(value) > bound:
                    yield MassiveScalar(layer, row.index, int(token), row.tokens[token], int(dim), float(value))


def _first_non_finite(rows: Sequence[Row], summaries: Mapping[int, SequenceSummary]) -> NonFinite | None:
    n_sites = len(summaries[rows[0].index].n_non_finite)
    for at in range(n_sites):
        for row in rows:
            summary = summaries[row.index]
            if summary.n_non_finite[at]:
                return NonFinite(
                    layer=at - 1 if at else None,
                    sequence=row.index,
                    token_index=int(summary.tokens[at, 0]),
                    dim=int(summary.dims[at, 0]),
                    value=str(summary.values[at, 0]),
                )
    return None


def _finite(value: float | np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None
