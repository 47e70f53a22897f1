"""`locate` without the model in memory: one block at a time comes from the checkpoint, runs, and goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from melayer import architecture, hooks
from melayer.architecture import Decoder, Site
from melayer.errors import InputError, ModelError
from melayer.inputs import Batch, Row, batches, builtin_texts, encode
from melayer.locate import (
    Course,
    Criterion,
    LocateResult,
    Progress,
    conclude,
    course_of,
    courses,
    find_me_layer,
    followed_points,
    forward,
    settings_of,
    summaries_of,
    voting,
)
from melayer.models import DTypeName, device_of, skeleton
from melayer.provenance import describe, sample
from melayer.shards import Reader, Shards
from melayer.statistics import Summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TOKENS = 32
"""Tokens kept of each text: the first one sees only itself, and the criterion needs ordinary ones beside it."""
KEPT_BYTES = 256 * 2**20
"""What the states of all tokens may take, where they take more than a block; else the file is read once more."""


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Every block that is wanted has run; neither the rest of the blocks nor the head has anything to tell."""


def locate_frugal(
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
        parts: Names of parts that `architecture.read` does not find by itself.
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
    with _streamed(model, shards, parts or {}, target, trust_remote_code) as stream:
        decoder = architecture.read(model, parts=parts)
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
        if stop_early and len(passes) > 1:
            width = max(map(len, rows))
            raise InputError(
                f"To stop early, all texts must run together: {len(rows)} texts of up to {width} tokens take "
                f"{len(rows) * width} places, and max_batch_tokens is {max_batch_tokens}. Give fewer or shorter texts, "
                f"or --max-batch-tokens {len(rows) * width}."
            )
        stream.begin(decoder, progress, len(passes))
        states = _States(decoder, passes, stream.block_bytes)
        judge = _Judge(decoder, rows, criterion, passes[0]) if stop_early else None

        def made(place: int, summary: Summary) -> None:
            if judge is not None and judge.is_certain(place, summary):
                stream.last = place - 1

        summaries = summaries_of(
            decoder,
            rows,
            criterion,
            k=max_listed,
            max_batch_tokens=max_batch_tokens,
            around=states.watched,
            made=made,
            run=stream.run,
        )
        n_run = len(next(iter(summaries.values())).n_massive) - 1

        def follow(targets: Mapping[int, tuple[Row, int]]) -> Iterable[tuple[list[int], Course]]:
            if states.kept:
                return states.courses(targets)
            return courses(decoder, targets, max_batch_tokens=max_batch_tokens, run=stream.run)

        settings = settings_of(rows, texts, max_tokens, bos) | {
            "frugal": {"blocks_run": n_run, "stop_early": stop_early}
        }
        notes = ["Frugal: one block at a time was read from the checkpoint."]
        if n_run < decoder.n_layers:
            notes.append(
                f"Stopped after block {n_run - 1}, when the ME layer was certain: shares are of the largest state up "
                "to there, where it is erased is not known, and of the other blocks the fingerprint takes the shapes."
            )
        return conclude(
            decoder, rows, summaries, criterion, describe(decoder, name, stream.samples), settings, follow, notes
        )


class _States:
    """What the tokens of each row were at every block, so that those that prove massive can be followed."""

    def __init__(self, decoder: Decoder, passes: Sequence[Batch], block_bytes: int) -> None:
        self._points = followed_points(decoder)
        self._seen: dict[int, dict[tuple[int, Site], torch.Tensor]] = {}
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
                kept = hidden[place, : len(row)].to("cpu", copy=True)
                self._seen.setdefault(row.index, {})[key] = kept

        with hooks.watch(self._points if self.kept else (), see):
            yield

    def courses(self, targets: Mapping[int, tuple[Row, int]]) -> Iterator[tuple[list[int], Course]]:
        """As `locate.courses`, without another run."""
        for sequence, (_, token) in targets.items():
            states = {key: hidden[token].float().numpy() for key, hidden in self._seen[sequence].items()}
            yield [sequence], course_of(states)


class _Judge:
    """Whether the ME layer is certain, block by block; all sequences are in one batch."""

    def __init__(self, decoder: Decoder, rows: Sequence[Row], criterion: Criterion, batch: Batch) -> None:
        voters = voting(rows, criterion)
        self._voters = [place for place, row in enumerate(batch.rows) if row.index in voters]
        self._criterion, self._n_layers = criterion, decoder.n_layers
        self._columns: list[NDArray[np.bool_]] = []

    def is_certain(self, place: int, summary: Summary) -> bool:
        """Whether it is, given the summary of block `place - 1`, which comes after that of the block before."""
        if place == 0:
            return False
        holds = (summary.n_massive > 0) & (summary.n_non_finite == 0)
        self._columns.append(holds.cpu().numpy()[self._voters])
        return find_me_layer(np.stack(self._columns, axis=1), self._criterion, self._n_layers) is not None


# --- blocks that come and go --------------------------------------------------------------------------------------


class _Stream:
    """The blocks of a model whose weights are on the meta device, brought in before each runs, dropped after."""

    def __init__(self, model: PreTrainedModel, shards: Shards, parts: Mapping[str, str], device: torch.device) -> None:
        self._model, self._shards, self._device = model, shards, device
        self._mapping = _conversions(model)
        # By their place among all blocks of all lists: which list is the decoder's is known only once it runs.
        lists = architecture.block_lists(model, parts)
        self._blocks = [(f"{path}.{at}", block) for path, blocks in lists.items() for at, block in enumerate(blocks)]
        self._lasting: set[str] = set()
        self._names, self._rest = self._grouped()
        self._reader = Reader(shards, self._names)
        self._decoder: Decoder | None = None
        self._progress: Progress | None = None
        self._total = self._done = 0
        self.last: int | None = None
        """The last block that is wanted; None for all."""
        self.samples: dict[str, torch.Tensor] = {}
        """What the fingerprint takes of the weights that came and went."""

    @property
    def block_bytes(self) -> int:
        """The size of the largest block in the file."""
        return max(sum(self._shards.places[name].n_bytes for name in names) for names in self._names)

    def begin(self, decoder: Decoder, progress: Progress | None, passes: int) -> None:
        """From here on what runs counts as progress, and `last` is obeyed."""
        self._decoder, self._progress, self._total = decoder, progress, passes * decoder.n_layers

    def run(self, model: PreTrainedModel, batch: Batch) -> None:
        """Runs a batch as far as it is wanted."""
        assert self._decoder is not None
        # Registered behind all who watch the last block; the head, which nobody needs, is not even read.
        end = (None, self._decoder.blocks[-1].sites["block_out"])
        with suppress(_Enough), hooks.watch([end], _end):
            forward(model, batch)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The weights that are in no block are there inside the context, and those of a block while it runs."""
        blocks = list(enumerate(block for _, block in self._blocks))
        outputs = [(group, hooks.Point(block, "output")) for group, block in blocks]
        with self._reader, hooks.record_arguments(blocks, self._bring), hooks.watch(outputs, self._drop):
            self._load({name: self._shards.views[name] for name in self._rest})
            # With its weight in place, whatever shares it is to have it too.
            self._model.tie_weights()
            yield

    def _bring(self, group: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prefix, block = self._blocks[group]
        if self._decoder is not None and self.last is not None and self._layer(block) > self.last:
            raise _Enough
        self._load(self._reader.get(group))
        for name, parameter in block.named_parameters():
            if parameter.device.type == "meta":
                raise ModelError(
                    f"{prefix}.{name} is in no file of {self._shards.directory} as a weight of its own: it is shared "
                    "with another block, and such a model cannot be read block by block. Leave --frugal out."
                )
            self.samples.setdefault(f"{prefix}.{name}", sample(parameter))

    def _drop(self, group: int, output: torch.Tensor) -> None:
        block = self._blocks[group][1]
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
        if self._progress is not None:
            self._done += 1
            self._progress(min(self._done, self._total), self._total)

    def _layer(self, block: nn.Module) -> int:
        assert self._decoder is not None
        return next((known.layer for known in self._decoder.blocks if known.module is block), 0)

    def _grouped(self) -> tuple[list[list[str]], list[str]]:
        """The checkpoint's names by the block that they go into, and those that go into none."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        known = self._model.state_dict()
        buffers = {name for name, _ in self._model.named_buffers()}
        names: list[list[str]] = [[] for _ in self._blocks]
        rest = []
        for key in self._shards.views:
            target, _ = rename_source_key(key, renamings, converters, self._model.base_model_prefix, known)
            if target not in known and key in known:
                target = key
            if target in buffers:
                self._lasting.add(key)
            places = [place for place, (prefix, _) in enumerate(self._blocks) if target.startswith(f"{prefix}.")]
            if not places:
                rest.append(key)
            else:
                names[places[0]].append(key)
        return names, rest

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts tensors of the checkpoint where they belong, converted as `from_pretrained` converts them."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        options = LoadStateDictConfig(
            device_map={"": self._device}, dtype=self._model.dtype, weight_mapping=self._mapping
        )
        # Buffers are not dropped with their block, and the reader's memory is used again.
        given = {key: tensor.clone() if key in self._lasting else tensor for key, tensor in tensors.items()}
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(self._model, given, options)
        finally:
            if shown:
                logging.enable_progress_bar()
        if info.conversion_errors:
            where, error = next(iter(info.conversion_errors.items()))
            raise ModelError(f"{where} of {self._shards.directory} cannot be converted: {error.splitlines()[-1]}")


def _end(key: None, tensor: torch.Tensor) -> None:
    raise _Enough


@contextmanager
def _streamed(
    model: PreTrainedModel, shards: Shards, parts: Mapping[str, str], device: torch.device, trust_remote_code: bool
) -> Iterator[_Stream]:
    """The model runs inside the context: its weights come and go, and whatever is in no block stays."""
    _fill_buffers(model, device, trust_remote_code)
    stream = _Stream(model, shards, parts, device)
    with stream.running():
        yield stream


def _conversions(model: PreTrainedModel) -> list[Any]:
    """How transformers turns this model's checkpoints into its parameters (experts that it merges, old names)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _fill_buffers(model: PreTrainedModel, device: torch.device, trust_remote_code: bool) -> None:
    """The buffers that no checkpoint holds (rotary frequencies, scales), as the family's own code computes them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        twin = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype, trust_remote_code=trust_remote_code)
    made = dict(twin.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta":
                setattr(module, name, made[f"{path}.{name}" if path else name].to(device))
