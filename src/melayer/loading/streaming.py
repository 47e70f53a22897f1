"""A model whose blocks come from the checkpoint one at a time, run, and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from melayer.data.rows import Batch
from melayer.errors import ModelError
from melayer.loading.shards import Reader, Shards
from melayer.model import hooks
from melayer.model.block_lists import block_lists
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.model.provenance import sample
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stream:
    """The blocks of a model whose weights are on the meta device, brought in before each runs, dropped after."""

    def __init__(self, model: PreTrainedModel, shards: Shards, parts: Mapping[str, str], device: torch.device) -> None:
        """Nothing is read yet."""
        self._model, self._shards, self._device = model, shards, device
        self._mapping = _conversions(model)
        # By their place among all blocks of all lists: which list is the decoder's is known only once it runs.
        lists = block_lists(model, parts)
        self._blocks = [(f"{path}.{at}", block) for path, blocks in lists.items() for at, block in enumerate(blocks)]
        self._lasting: set[str] = set()
        self._names, self._rest = self._grouped()
        self._reader = Reader(shards, self._names)
        self._decoder: Decoder | None = None
        self._progress: Progress | None = None
        self._total = self._done = 0
        self._stop: Callable[[], NoReturn] | None = None
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
        with hooks.stoppable() as stop, hooks.watch([end], lambda key, output: stop()):
            self._stop = stop
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
            assert self._stop is not None
            self._stop()
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


@contextmanager
def streamed(
    model: PreTrainedModel, shards: Shards, parts: Mapping[str, str], device: torch.device, trust_remote_code: bool
) -> Iterator[Stream]:
    """The model runs inside the context: its weights come and go, and whatever is in no block stays.

    Args:
        model: With every weight on the meta device.
        shards: The checkpoint.
        parts: Names of parts that `wiring.read` does not find by itself.
        device: Where it runs.
        trust_remote_code: Whether its modelling code may come from the checkpoint.

    Raises:
        ArchitectureError: It has no list of blocks.
        ModelError: The checkpoint cannot be read.
    """
    _fill_buffers(model, device, trust_remote_code)
    stream = Stream(model, shards, parts, device)
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
