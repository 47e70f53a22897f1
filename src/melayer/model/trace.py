"""A few tokens through the model as far as one block of each kind, and what each module in it read and returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from melayer.errors import ArchitectureError, border
from melayer.model.block_lists import signature
from melayer.model.forward import probe_ids
from melayer.model.hooks import Call, edits_paused, measuring, record_calls, stoppable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class TracedBlock:
    """What happened in the first block of its kind."""

    layer: int
    whole: Call
    """The block itself."""
    calls: Mapping[str, Call]
    """What is in it, down to the children of its children, by name and in the order in which they ended."""

    @property
    def block_in(self) -> torch.Tensor:
        """What it read [2, 4, d_model]."""
        assert self.whole.read is not None
        return self.whole.read

    @property
    def block_out(self) -> torch.Tensor:
        """What it returned [2, 4, d_model]."""
        assert self.whole.returned is not None
        return self.whole.returned


@dataclass(eq=False)
class _Kind:
    """A kind of block in one of the lists, while the tokens run."""

    path: str
    signature: str
    layer: int
    calls: dict[str, Call] = field(default_factory=dict)
    whole: Call | None = None


def trace(model: PreTrainedModel, lists: Mapping[str, nn.ModuleList]) -> dict[str, dict[str, TracedBlock]]:
    """For each list whose blocks run, the first block of each kind by its signature, in the order of the blocks.

    No edit is at work: a mask that is applied would stand between a norm and its reader. The pass ends when every
    kind of block of one list has run.

    Args:
        model: With its weights in place.
        lists: The lists of blocks, by path.
    """
    kinds = [kind for path, blocks in lists.items() for kind in _kinds(path, blocks)]
    watched, owners = _watched(kinds, lists)

    todo = "Check its config against its weights."
    with (
        border(f"{type(model).__name__} does not run on a few tokens", todo, error=ArchitectureError),
        stoppable() as stop,
    ):

        def note(call: Call) -> None:
            kind, name = owners[call.name]
            own = Call(name, call.read, call.returned, call.keywords, call.returns_tuple)
            if name:
                kind.calls[name] = own
                return
            kind.whole = own
            if all(other.whole is not None for other in kinds if other.path == kind.path):
                stop()

        ids = probe_ids(model)
        # Under autocast a sum would be of another dtype than its parts.
        own = torch.autocast(ids.device.type, enabled=False)
        with measuring(model), edits_paused(model), record_calls(watched, note), own:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    traced: dict[str, dict[str, TracedBlock]] = {}
    for kind in kinds:
        if kind.whole is not None:
            traced.setdefault(kind.path, {})[kind.signature] = TracedBlock(kind.layer, kind.whole, kind.calls)
    return traced


def _kinds(path: str, blocks: nn.ModuleList) -> list[_Kind]:
    """The kinds of block in a list, each with the first layer that is of it."""
    layers: dict[str, int] = {}
    for layer, block in enumerate(blocks):
        layers.setdefault(signature(block), layer)
    return [_Kind(path, of, layer) for of, layer in layers.items()]


def _watched(
    kinds: list[_Kind], lists: Mapping[str, nn.ModuleList]
) -> tuple[list[tuple[str, nn.Module]], dict[str, tuple[_Kind, str]]]:
    """The modules to watch, each with a key; and for each key its kind and its name in the block."""
    watched: list[tuple[str, nn.Module]] = []
    owners: dict[str, tuple[_Kind, str]] = {}
    for kind in kinds:
        for name, module in lists[kind.path][kind.layer].named_modules():
            if name.count(".") <= 1:
                key = f"{kind.path}/{kind.layer}/{name}"
                owners[key] = (kind, name)
                watched.append((key, module))
    return watched, owners
