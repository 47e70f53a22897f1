"""The neurons of a dense FFN or of one expert, what they write, and the edits that scale their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from melayer.model.decoder import Projection
from melayer.model.hooks import Point
from melayer.model.isolated_block import Edit


@dataclass(frozen=True, eq=False)
class Scale:
    """What the weights of each neuron are multiplied by, each [neurons] or a number."""

    gate: torch.Tensor | float = 1.0
    up: torch.Tensor | float = 1.0
    down: torch.Tensor | float = 1.0


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of a dense FFN, or of one expert, for one token: `act @ down.T + bias` is what they write."""

    expert: int | str | None
    """Its number; "shared" for an expert that every token visits; None for a dense FFN."""
    weight: float | None
    """The routing weight, already in `act` and `bias`."""
    act: torch.Tensor
    """[neurons], float32 on the host, as are the biases."""
    down: torch.Tensor
    """[d_model, neurons]; the matrices are views of the model's own."""
    bias: torch.Tensor | None
    """[d_model]"""
    gate: torch.Tensor | None
    """[neurons, d_model]"""
    up: torch.Tensor | None
    biases: Mapping[str, torch.Tensor]
    """Those of gate and up, [neurons]."""

    def ordinary(self) -> Scale:
        """The scales that bring the weights of every neuron to at most the median norm of all."""

        def shrink(matrix: torch.Tensor | None, dim: int) -> torch.Tensor | float:
            if matrix is None:
                return 1.0
            norms = torch.linalg.vector_norm(matrix.float(), dim=dim)
            factor: torch.Tensor = (norms.median() / norms.clamp(min=1e-30)).clamp(max=1.0).cpu()
            return factor

        return Scale(shrink(self.gate, 1), shrink(self.up, 1), shrink(self.down, 0))

    def without(self, neurons: Iterable[int]) -> Scale:
        """The scales that remove some neurons."""
        kept = torch.ones(len(self.act))
        kept[list(neurons)] = 0.0
        return Scale(down=kept)

    def written(self) -> torch.Tensor:
        """[d_model] what they write, float32 on the host."""
        written = self.written_by(self.act)
        return written if self.bias is None else written + self.bias

    def written_by(self, act: torch.Tensor) -> torch.Tensor:
        """[d_model] what other activations [neurons] would write, without the bias."""
        return (self.down.float() @ act.to(self.down.device)).cpu()


def dense_neurons(
    gate: Projection | None, up: Projection | None, down: Projection, act: torch.Tensor, expert: str | None = None
) -> Neurons:
    """The neurons of a dense FFN.

    Args:
        gate: Its gate, where it has one.
        up: What makes the neurons; None where it is not known.
        down: What writes.
        act: [neurons] what `down` reads for the token.
        expert: "shared" for a shared expert.
    """
    biases = {name: part.bias() for name, part in (("gate", gate), ("up", up)) if part is not None}
    bias = down.bias()
    return Neurons(
        expert=expert,
        weight=None,
        act=act,
        down=down.weight(),
        bias=None if bias is None else bias.float().cpu(),
        gate=None if gate is None else gate.weight(),
        up=None if up is None else up.weight(),
        biases={name: bias.float().cpu() for name, bias in biases.items() if bias is not None},
    )


def dense_scaled(gate: Projection | None, up: Projection | None, down: Projection, scale: Scale) -> list[Edit]:
    """The edits under which the neurons of a dense FFN have scaled weights."""
    edits: list[Edit] = []
    for part, factor in ((gate, scale.gate), (up, scale.up)):
        if part is not None and isinstance(factor, torch.Tensor):
            edits.append((Point(part.module, "output"), _scaled_rows(part, factor)))
    if isinstance(scale.down, torch.Tensor):
        factor = scale.down
        edits.append((Point(down.module, "input"), lambda x: x * factor.to(x)))
    return edits


def _scaled_rows(part: Projection, factor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = part.bias()

    def change(out: torch.Tensor) -> torch.Tensor:
        whole = torch.ones(out.shape[-1])
        shift = torch.zeros_like(out)
        half = out.shape[-1] // 2
        rows = {"whole": slice(None), "first half": slice(half), "second half": slice(half, None)}[part.part]
        whole[rows] = factor
        if bias is not None:
            shift[..., rows] = bias.to(out)
        return (out - shift) * whole.to(out) + shift

    return change
