"""Gate, up and down of an FFN, told by which linear map in it read what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from melayer.model.hooks import Call

ProjectionPart = tuple[str, Literal["whole", "first half", "second half"]]
"""The name of a linear map in the block, and which of its rows."""


@dataclass(frozen=True)
class FFNParts:
    """The names of an FFN's parts in the block; None for what was not told."""

    name: str
    kind: Literal["gated", "plain", "experts", "unknown"]
    gate: ProjectionPart | None = None
    up: ProjectionPart | None = None
    down: str | None = None


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are the same numbers in memory, so that one module read what the other returned."""
    if a is None or b is None:
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype)


def writer(branch: str, calls: Mapping[str, Call], modules: Mapping[str, nn.Module]) -> str | None:
    """The linear map inside a branch that returns what the branch returns; None where it has none."""
    returned = calls[branch].returned
    return next((name for name in _linear_maps(branch, calls, modules) if same(calls[name].returned, returned)), None)


def ffn_parts(ffn: str, calls: Mapping[str, Call], modules: Mapping[str, nn.Module]) -> FFNParts:
    """The parts of the FFN `ffn`, given what each module of the block read and returned.

    Args:
        ffn: Its name in the block.
        calls: Of the block's modules, by name.
        modules: The block's modules, by name.
    """
    if any(p.ndim > 2 for p in modules[ffn].parameters()) or any(
        isinstance(module, nn.ModuleList) for module in modules[ffn].modules()
    ):
        return FFNParts(ffn, "experts")
    linear = _linear_maps(ffn, calls, modules)
    down = writer(ffn, calls, modules)
    readers = [name for name in linear if same(calls[name].read, calls[ffn].read) and name != down]
    if down is None or not readers:
        return FFNParts(ffn, "unknown")
    # What activation functions read: the modules in the FFN that are no linear maps.
    activated = [
        call.read
        for name, call in calls.items()
        if name.startswith(f"{ffn}.") and name not in linear and call.read is not None
    ]
    if len(readers) == 2:
        gate = next((name for name in readers if any(same(calls[name].returned, read) for read in activated)), None)
        if gate is None:
            return FFNParts(ffn, "unknown", down=down)
        up = readers[1 - readers.index(gate)]
        return FFNParts(ffn, "gated", (gate, "whole"), (up, "whole"), down)
    if len(readers) == 1:
        return _of_one_reader(ffn, readers[0], down, calls, activated)
    return FFNParts(ffn, "unknown", down=down)


def _of_one_reader(
    ffn: str, reader: str, down: str, calls: Mapping[str, Call], activated: list[torch.Tensor]
) -> FFNParts:
    """The parts where one linear map reads what the FFN reads: up alone, or gate and up in one."""
    act, first = calls[down].read, calls[reader].returned
    assert act is not None
    assert first is not None
    width = act.shape[-1]
    if first.shape[-1] == width:
        return FFNParts(ffn, "plain", None, (reader, "whole"), down)
    if first.shape[-1] == 2 * width:
        # The activation reads a view of the fused output: its offset tells which half is the gate.
        for read in activated:
            offset = (read.data_ptr() - first.data_ptr()) // first.element_size()
            if read.shape[-1] == width and offset in (0, width):
                if offset == 0:
                    return FFNParts(ffn, "gated", (reader, "first half"), (reader, "second half"), down)
                return FFNParts(ffn, "gated", (reader, "second half"), (reader, "first half"), down)
    return FFNParts(ffn, "unknown", down=down)


def _linear_maps(branch: str, calls: Mapping[str, Call], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules inside a branch that hold a matrix, in the order in which they ended."""
    return [
        name for name in calls if name.startswith(f"{branch}.") and any(p.ndim == 2 for p in modules[name].parameters())
    ]
