"""What the linear maps of the blocks read: the tensors that are rounded where activations are quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from melayer.errors import InputError
from melayer.model.decoder import Decoder
from melayer.model.forward import probe_ids
from melayer.model.hooks import Call, Point, edits_paused, measuring, record_calls


@dataclass(frozen=True)
class LinearInput:
    """One tensor that one or several linear maps of a block read (q, k and v read the same).

    It names the maps and holds none, so that a result with it keeps no model alive.
    """

    layer: int
    paths: tuple[str, ...]
    """Of the maps within the block, in the order in which they run."""
    names: tuple[str, ...]
    """Of the same in the model."""
    width: int


@dataclass(frozen=True)
class LinearInputs:
    """What `find_linear_inputs` found."""

    inputs: tuple[LinearInput, ...]
    """All of a model's, in the order in which they run."""
    notes: tuple[str, ...]
    """What is not among them."""


def find_linear_inputs(decoder: Decoder) -> LinearInputs:
    """What each `nn.Linear` (or `Conv1D`) of the blocks reads; the head and whatever lies outside of them is left out.

    A few tokens run through the model: which maps read the very same tensor is seen, not guessed from names.

    Raises:
        InputError: The weights are quantised already, or an adapter is not merged.
    """
    _check_weights(decoder.model)
    maps, n_in_lists = _linear_maps(decoder)
    read, n_tokens = _tensors_read(decoder, maps)
    by_tensor: dict[int, list[str]] = {}  # all are held, so no two have the same id
    for name, tensor in read.items():
        if tensor.shape[:-1].numel() == n_tokens:
            by_tensor.setdefault(id(tensor), []).append(name)
    inputs = tuple(
        LinearInput(
            layer=maps[names[0]].layer,
            paths=tuple(maps[name].path for name in names),
            names=tuple(names),
            width=read[names[0]].shape[-1],
        )
        for names in by_tensor.values()
    )
    if not inputs:
        raise InputError(
            f"{type(decoder.model).__name__} has no linear map in its blocks that reads every token, so there is "
            "nothing to quantise."
        )
    n_left_out = len(maps) - sum(len(at.names) for at in inputs) + n_in_lists
    return LinearInputs(inputs, tuple(_notes(decoder, n_left_out)))


def readers(decoder: Decoder, inputs: Sequence[LinearInput]) -> Iterator[tuple[int, Point]]:
    """Every point of the model where one of them is read, with its place among them."""
    for place, at in enumerate(inputs):
        for name in at.names:
            yield place, Point(decoder.model.get_submodule(name), "input")


def joined(paths: Sequence[str]) -> str:
    """`self_attn.q_proj, k_proj, v_proj`: the first path whole, of the others the last part."""
    return ", ".join([paths[0], *(path.rpartition(".")[2] for path in paths[1:])])


@dataclass(frozen=True, eq=False)
class _LinearMap:
    layer: int
    path: str
    """Within its block."""
    module: nn.Module


def _linear_maps(decoder: Decoder) -> tuple[dict[str, _LinearMap], int]:
    """The linear maps of the blocks by their names in the model, and how many there are in lists of modules."""
    maps: dict[str, _LinearMap] = {}
    n_in_lists = 0
    name_of = {module: name for name, module in decoder.model.named_modules()}
    for block in decoder.blocks:
        lists = [path for path, module in block.module.named_modules() if isinstance(module, nn.ModuleList)]
        for path, module in block.module.named_modules():
            if not _is_linear(module):
                continue
            # One expert of many reads some tokens in an order of its own.
            if any(path.startswith(f"{of}.") for of in lists):
                n_in_lists += 1
                continue
            maps[name_of[module]] = _LinearMap(block.layer, path, module)
    return maps, n_in_lists


def _tensors_read(decoder: Decoder, maps: Mapping[str, _LinearMap]) -> tuple[dict[str, torch.Tensor], int]:
    """The very tensor that each map reads while a few tokens run, in the order of running, and how many tokens."""
    read: dict[str, torch.Tensor] = {}

    def note(call: Call) -> None:
        if call.read is not None:
            read[call.name] = call.read

    ids = probe_ids(decoder.model)
    watched = [(name, of.module) for name, of in maps.items()]
    with measuring(decoder.model), edits_paused(decoder.model), record_calls(watched, note):
        decoder.model(input_ids=ids, use_cache=False)
    return read, ids.numel()


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2) is a linear map and says so by its `nf` outputs.
    return isinstance(module, nn.Linear) or (hasattr(module, "nf") and hasattr(module, "weight"))


def _check_weights(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    packed = getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False)
    weights = (getattr(module, "weight", None) for module in model.modules() if _is_linear(module))
    if packed or any(isinstance(of, torch.Tensor) and not of.is_floating_point() for of in weights):
        raise InputError(
            "The weights of this model are quantised already, so what quantising its activations costs cannot be told "
            "from what that cost. Give the checkpoint with whole weights."
        )
    if hasattr(model, "peft_config"):
        raise InputError(
            "An adapter is attached to this model, whose own maps would be rounded apart from the weights they belong "
            "to. Merge it first: model.merge_and_unload()."
        )


def _notes(decoder: Decoder, n_left_out: int) -> list[str]:
    notes = []
    experts = sum(block.ffn is not None and block.ffn.kind == "experts" for block in decoder.blocks)
    if experts:
        notes.append(
            f"What the experts of {experts} blocks read is not rounded: each reads some of the tokens, in weights of "
            "its own."
        )
    elif n_left_out:
        notes.append(
            f"{n_left_out} linear maps of the blocks do not read every token, and what they read is not rounded."
        )
    return notes
