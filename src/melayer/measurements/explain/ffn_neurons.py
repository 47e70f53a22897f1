"""The neurons that write an FFN's output for one token, dense or in experts: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from melayer.measurements.explain.expert_neurons import Experts, find_experts, read_by
from melayer.measurements.explain.neurons import Neurons, Scale, dense_neurons, dense_scaled
from melayer.model.decoder import FeedForward, Projection
from melayer.model.hooks import Point
from melayer.model.isolated_block import BlockAlone, Called, Edit


@dataclass(frozen=True, eq=False)
class FfnNeurons:
    """All neurons that one token visits, and how to scale their weights."""

    parts: tuple[Neurons, ...]
    token: int
    dense: tuple[Projection | None, Projection | None, Projection] | None
    """Gate, up and down of the dense FFN or of the shared expert."""
    experts: Experts | None
    arguments: list[Called]
    """Filled by `listen` in each run."""

    @property
    def listen(self) -> list[tuple[list[Called], nn.Module]]:
        """What `BlockAlone.run` has to listen to under `scaled`."""
        return [(self.arguments, self.experts.module)] if self.experts else []

    def scaled(self, scale_of: Callable[[Neurons], Scale]) -> list[Edit]:
        """The edits under which the neurons have scaled weights."""
        edits = []
        if self.dense is not None:
            part = next(part for part in self.parts if part.expert in (None, "shared"))
            edits += dense_scaled(*self.dense, scale_of(part))
        if self.experts is not None:
            edits.append(self.experts.scaled(self.token, self.arguments, scale_of))
        return edits


def read_neurons(
    alone: BlockAlone, ffn: FeedForward, token: int, activations: Mapping[str, torch.Tensor]
) -> FfnNeurons | None:
    """The neurons of an FFN for one token; None where what they write is not the FFN's recorded output.

    Args:
        alone: The block.
        ffn: Its FFN.
        token: The token.
        activations: [seq, d] the recorded `ffn_raw` (what the FFN returns) and, where the FFN is dense, `ffn_act`.
    """
    whole = activations["ffn_raw"][token]
    if any(p.device.type == "meta" for p in ffn.module.parameters()):
        return None  # offloaded: the weights are not here to be read
    dtype = next(p.dtype for p in ffn.module.parameters() if p.is_floating_point())
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps) * max(float(whole.abs().max()), 1e-6)
    readings: Iterator[FfnNeurons]
    if ffn.down is not None:
        part = dense_neurons(ffn.gate, ffn.up, ffn.down, activations["ffn_act"][token])
        readings = iter([FfnNeurons((part,), token, (ffn.gate, ffn.up, ffn.down), None, [])])
    else:
        readings = (_with_experts(alone, ffn.module, experts, token, whole) for experts in find_experts(ffn.module))
    return next((reading for reading in readings if _agree(reading.parts, whole, tolerance)), None)


def _agree(parts: Sequence[Neurons], whole: torch.Tensor, tolerance: float) -> bool:
    """Whether these neurons together write `whole` [d_model]."""
    written = torch.stack([part.written() for part in parts]).sum(0)
    return bool((written - whole).abs().max() <= tolerance)


def _with_experts(alone: BlockAlone, ffn: nn.Module, experts: Experts, token: int, whole: torch.Tensor) -> FfnNeurons:
    """The neurons of the experts that the token visits, and of the shared one where there is one.

    Args:
        alone: The block, which runs once more.
        ffn: The module that holds the experts.
        experts: How to read them.
        token: The token.
        whole: [d_model] what the FFN returns for it.
    """
    arguments: list[Called] = []
    points = {"experts": Point(experts.module, "output")}
    shared = _shared(ffn, experts.module)
    if shared is not None:
        points |= {"shared": Point(shared[0], "output"), "shared_act": Point(shared[1][2].module, "input")}
    again = alone.run(points=points, listen=[(arguments, experts.module)])
    x = read_by(arguments[-1])[token]
    parts = [experts.neurons(x, *visit) for visit in experts.visited(arguments[-1], token)]
    if shared is not None:
        # Its gate is one number for each token, whatever computes it.
        rest, written = whole - again["experts"][token], again["shared"][token]
        gate = float(rest @ written / (written @ written).clamp(min=1e-30))
        part = dense_neurons(*shared[1], again["shared_act"][token], "shared")
        bias = None if part.bias is None else part.bias * gate
        parts.append(replace(part, act=part.act * gate, bias=bias, weight=gate))
    return FfnNeurons(tuple(parts), token, shared[1] if shared else None, experts, arguments)


def _shared(ffn: nn.Module, experts: nn.Module) -> tuple[nn.Module, tuple[Projection, Projection, Projection]] | None:
    """The expert that every token visits, where there is exactly one beside the others."""
    names = ("gate_proj", "up_proj", "down_proj")
    shared = [
        (child, name)
        for name, child in ffn.named_children()
        if child is not experts and all(isinstance(getattr(child, part, None), nn.Linear) for part in names)
    ]
    if len(shared) != 1:
        return None
    child, name = shared[0]
    gate, up, down = (Projection(f"{name}.{part}", getattr(child, part)) for part in names)
    return child, (gate, up, down)
