"""`locate` without the model in memory: one block at a time comes from the checkpoint, runs, and goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from melayer.data.rows import Batch, Row, batches, encode
from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.loading.checkpoint import skeleton
from melayer.loading.devices import DTypeName, device_of
from melayer.loading.streaming import streamed
from melayer.measurements.criterion import Criterion, find_me_layer, voting
from melayer.measurements.locate.conclude import conclude
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.locate.trajectory import (
    Targets,
    Trajectory,
    followed_points,
    trajectories,
    trajectory_of,
)
from melayer.measurements.settings import FrugalLocateSettings, locate_settings
from melayer.measurements.summaries import MassiveDims, summaries_of
from melayer.model import hooks, wiring
from melayer.model.decoder import Decoder, Site
from melayer.model.provenance import describe
from melayer.numerics.summary import Summary
from melayer.runs.progress import Progress

MAX_TOKENS = 32
"""Tokens kept of each text: the first one sees only itself, and the criterion needs ordinary ones beside it."""
KEPT_BYTES = 256 * 2**20
"""What the states of all tokens may take, where they take more than a block; else the file is read once more."""


def locate_frugal(  # noqa: PLR0913 - public: every option has a name
    name: str,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_listed: int = 16,
    max_batch_tokens: int = 2048,
    stop_early: bool = False,
    parts: Mapping[str, str] | None = None,
    dtype: DTypeName = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    mask: bool = True,
    progress: Progress | None = None,
) -> LocateResult:
    """What `locate` finds on the same texts, for a model that need not fit into memory.

    Blocks are read from the safetensors files one after the other, each while the one before it runs. In memory are
    two blocks, the rows of the embedding that the texts need, and the states of a few tokens.

    Args:
        name: `demo`, a local directory, a `.gguf` file or a hub id, as `load` takes it.
        texts: What to run; by default the built-in ones.
        max_tokens: Tokens kept of each text; by default 32. Few are enough, and more take more memory.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: Thresholds, persistence and majority.
        max_listed: How many massive scalars to list for each sequence and block; all are counted.
        max_batch_tokens: Tokens in one forward pass. Each pass reads the file.
        stop_early: Stop when no later block can change which one the ME layer is. `blocks` and all that is
            computed from them then end there, and where the activation is erased is not known.
        parts: Names of parts that `wiring.read` does not find by itself.
        dtype: As in `load`; another one than the checkpoint's takes memory for the converted embedding and blocks.
        device: As in `load`.
        trust_remote_code: As in `load`.
        revision: As in `load`.
        mask: False leaves out the mask that was saved with the model; where there is one, it cannot be applied.
        progress: Called with the blocks done and the blocks in all.

    Returns:
        The result of `locate`; `settings` say how it was made.

    Raises:
        InputError: The texts or the options make no measurement.
        ModelError: The model cannot be found or read, or not block by block.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.locate_frugal("demo").me_layer  # doctest: +SKIP
        11
    """
    criterion = criterion or Criterion()
    if max_listed < 1:
        raise InputError(f"max_listed is {max_listed}; expected at least 1.")
    target = device_of(device)
    model, tokenizer, shards = skeleton(
        name, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, mask=mask
    )
    with streamed(model, shards, parts or {}, target, trust_remote_code) as stream:
        decoder = wiring.read(model, parts=parts)
        if max_tokens is None:
            max_tokens = min(MAX_TOKENS, decoder.max_positions or MAX_TOKENS)
        rows = encode(
            tokenizer,
            builtin_texts() if texts is None else texts,
            max_tokens=max_tokens,
            max_positions=decoder.max_positions,
            bos=bos,
        )
        passes = list(batches(rows, max_batch_tokens=max_batch_tokens))
        if stop_early:
            _require_one_pass(rows, passes, max_batch_tokens)
        stream.begin(decoder, progress, len(passes))
        states = _TokenStates(decoder, passes, stream.block_bytes)
        certainty = _Certainty(decoder, rows, criterion, passes[0]) if stop_early else None
        dims = MassiveDims()

        def on_summary(place: int, summary: Summary) -> None:
            dims.add(place, summary)
            if certainty is not None and certainty.reached(place, summary):
                stream.last = place - 1

        def follow(targets: Targets) -> Iterable[tuple[list[int], Trajectory]]:
            if states.kept:
                return states.trajectories(targets)
            return trajectories(decoder, targets, max_batch_tokens=max_batch_tokens, run_batch=stream.run)

        summaries = summaries_of(
            decoder,
            passes,
            criterion,
            k=max_listed,
            during_batch=states.watched,
            on_summary=on_summary,
            run_batch=stream.run,
        )
        n_run = summaries[0].n_run
        settings: FrugalLocateSettings = {
            **locate_settings(rows, texts, max_tokens, bos, max_listed),
            "frugal": {"blocks_run": n_run, "stop_early": stop_early},
        }
        return conclude(
            rows,
            summaries,
            dims,
            criterion,
            describe(decoder, name, stream.samples),
            settings,
            follow,
            _notes(n_run, decoder.n_layers),
        )


def _require_one_pass(rows: Sequence[Row], passes: Sequence[Batch], max_batch_tokens: int) -> None:
    """Raises InputError where the sequences run in several passes: the ME layer is certain when all have run."""
    if len(passes) > 1:
        width = max(map(len, rows))
        raise InputError(
            f"To stop early, all texts must run together: {len(rows)} texts of up to {width} tokens take "
            f"{len(rows) * width} places, and max_batch_tokens is {max_batch_tokens}. Give fewer or shorter texts, "
            f"or --max-batch-tokens {len(rows) * width}."
        )


def _notes(n_run: int, n_layers: int) -> Iterator[str]:
    yield "Frugal: one block at a time was read from the checkpoint. Other first tokens were not looked at."
    if n_run < n_layers:
        yield (
            f"Stopped after block {n_run - 1}, when the ME layer was certain: shares are of the largest state up "
            "to there, where it is erased is not known, and of the other blocks the fingerprint takes the shapes."
        )


class _TokenStates:
    """What the tokens of each row were at every block, so that those that prove massive can be followed."""

    def __init__(self, decoder: Decoder, passes: Sequence[Batch], block_bytes: int) -> None:
        self._points = followed_points(decoder)
        self._by_row: dict[int, dict[tuple[int, Site], torch.Tensor]] = {}
        itemsize = decoder.model.dtype.itemsize
        n_tokens = sum(sum(batch.lengths) for batch in passes)
        needed = n_tokens * decoder.d_model * itemsize * len(self._points)
        self.kept = needed <= max(block_bytes, KEPT_BYTES)
        """Whether they take little enough; else the massive tokens run once more, alone."""

    @contextmanager
    def watched(self, batch: Batch) -> Iterator[None]:
        """Keeps the states of a batch that runs inside the context."""

        def see(key: tuple[int, Site], hidden: torch.Tensor) -> None:
            for place, row in enumerate(batch.rows):
                self._by_row.setdefault(row.index, {})[key] = hidden[place, : len(row)].to("cpu", copy=True)

        with hooks.watch(self._points if self.kept else (), see):
            yield

    def trajectories(self, targets: Targets) -> Iterator[tuple[list[int], Trajectory]]:
        """As `trajectory.trajectories`, without another run."""
        for sequence, (_, token) in targets.items():
            states = {key: hidden[token].float().numpy() for key, hidden in self._by_row[sequence].items()}
            yield [sequence], trajectory_of(states)


class _Certainty:
    """Whether the ME layer is certain, block by block; all sequences are in one batch."""

    def __init__(self, decoder: Decoder, rows: Sequence[Row], criterion: Criterion, batch: Batch) -> None:
        voters = voting(rows, criterion)
        self._voters = [place for place, row in enumerate(batch.rows) if row.index in voters]
        self._criterion, self._n_layers = criterion, decoder.n_layers
        self._n_holding: list[int] = []

    def reached(self, place: int, summary: Summary) -> bool:
        """Whether it is, given the summary of block `place - 1`, which comes after that of the block before."""
        if place == 0:  # the embedding's
            return False
        holds = (summary.n_massive > 0) & (summary.n_non_finite == 0)
        self._n_holding.append(int(holds.cpu()[self._voters].sum()))
        me_layer = find_me_layer(self._n_holding, len(self._voters), self._criterion, n_layers=self._n_layers)
        return me_layer is not None
