"""The neurons that write an FFN's output, dense or in experts: exactly, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from melayer.model import hooks
from melayer.model.decoder import FeedForward, Projection
from melayer.model.hooks import Point
from melayer.model.isolated_block import BlockAlone, Called, Edit


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
    found = {name: part.bias() for name, part in (("gate", gate), ("up", up)) if part is not None}
    bias = down.bias()
    return Neurons(
        expert=expert,
        weight=None,
        act=act,
        down=down.weight(),
        bias=None if bias is None else bias.float().cpu(),
        gate=None if gate is None else gate.weight(),
        up=None if up is None else up.weight(),
        biases={name: bias.float().cpu() for name, bias in found.items() if bias is not None},
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


# --- experts kept as one tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Experts:
    """A module that keeps all its experts in 3-D tensors and is told which ones each token visits."""

    module: nn.Module
    interleaved: bool
    """Stored [experts, in, out] with gate and up in turns and clamped (gpt-oss); else [experts, out, in] in halves."""

    def visited(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], token: int) -> list[tuple[int, float]]:
        """Which experts the token visits, with its routing weights, from what the module was called with."""
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim == 2]
        indices = next(t for t in tensors if not t.is_floating_point())
        weights = next(t for t in tensors if t.is_floating_point() and t.shape == indices.shape and t is not tensors[0])
        n_experts = len(self.module.down_proj)  # type: ignore[arg-type]
        pairs = zip(indices[token].tolist(), weights[token].float().tolist(), strict=True)
        return [(expert, weight) for expert, weight in pairs if expert < n_experts]

    def neurons(self, x: torch.Tensor, expert: int, weight: float, scale: Scale | None = None) -> Neurons:
        """The neurons of one expert for a token.

        Args:
            x: [d_model] what the token's FFN reads.
            expert: Its number.
            weight: The routing weight.
            scale: Of the neurons' weights, those of `down` left out.
        """
        scale = scale or Scale()
        module: Any = self.module
        both, down = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
        biases: dict[str, torch.Tensor] = {}
        if self.interleaved:
            gate, up, down = both.T[::2], both.T[1::2], down.T
            if getattr(module, "gate_up_proj_bias", None) is not None:
                bias = module.gate_up_proj_bias[expert].detach().float()
                biases = {"gate": bias[::2], "up": bias[1::2]}
        else:
            gate, up = both.chunk(2)
        x = x.float().to(gate.device)
        g = (gate.float() @ x) * _on(scale.gate, x) + biases.get("gate", 0.0)
        u = (up.float() @ x) * _on(scale.up, x) + biases.get("up", 0.0)
        if self.interleaved:
            g, u = g.clamp(max=module.limit), u.clamp(-module.limit, module.limit)
            act = (u + 1) * g * torch.sigmoid(g * module.alpha)
        else:
            act = module.act_fn(g) * u
        bias = getattr(module, "down_proj_bias", None)
        return Neurons(
            expert=expert,
            weight=weight,
            act=(act * weight).cpu(),
            down=down,
            bias=None if bias is None else (bias[expert].detach().float() * weight).cpu(),
            gate=gate,
            up=up,
            biases={name: bias.cpu() for name, bias in biases.items()},
        )

    def scaled(self, token: int, arguments: list[Called], scale_of: Callable[[Neurons], Scale]) -> Edit:
        """The edit under which the neurons that one token visits have scaled weights.

        Args:
            token: The token; the others are left as they are.
            arguments: Where a recorder puts what the module is called with.
            scale_of: The scales for an expert's neurons.
        """

        def change(out: torch.Tensor) -> torch.Tensor:
            args, kwargs = arguments[-1]
            x = hooks.first_tensor((*args, *kwargs.values()))
            assert x is not None
            new = out.clone()
            for expert, weight in self.visited(args, kwargs, token):
                plain = self.neurons(x[token], expert, weight)
                scale = scale_of(plain)
                other = self.neurons(x[token], expert, weight, scale)
                new[token] += _written_by(plain, other.act * scale.down - plain.act).to(out)
            return new

        return Point(self.module, "output"), change


def find_experts(ffn: nn.Module) -> list[Experts]:
    """The ways to read the experts inside an FFN; which one is right, the recorded output decides."""
    found = []
    for module in ffn.modules():
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == down.ndim == 3:
            if gate_up.shape[1] == 2 * down.shape[2] and hasattr(module, "act_fn"):
                found.append(Experts(module, interleaved=False))
            if gate_up.shape[2] == 2 * down.shape[1] and hasattr(module, "alpha") and hasattr(module, "limit"):
                found.append(Experts(module, interleaved=True))
    return found


def _on(factor: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    return factor.to(like.device) if isinstance(factor, torch.Tensor) else factor


# --- any FFN -------------------------------------------------------------------------------------------------------


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
    alone: BlockAlone, ffn: FeedForward, token: int, seen: Mapping[str, torch.Tensor]
) -> FfnNeurons | None:
    """The neurons of an FFN for one token; None where what they write is not the FFN's recorded output.

    Args:
        alone: The block.
        ffn: Its FFN.
        token: The token.
        seen: The recorded `ffn_raw` (what the FFN returns) and, where the FFN is dense, `ffn_act`.
    """
    whole = seen["ffn_raw"][token]
    if any(p.device.type == "meta" for p in ffn.module.parameters()):
        return None  # offloaded: the weights are not here to be read
    dtype = next(p.dtype for p in ffn.module.parameters() if p.is_floating_point())
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps) * max(float(whole.abs().max()), 1e-6)
    if ffn.down is not None:
        part = dense_neurons(ffn.gate, ffn.up, ffn.down, seen["ffn_act"][token])
        found = FfnNeurons((part,), token, (ffn.gate, ffn.up, ffn.down), None, [])
        return found if (_written(part) - whole).abs().max() <= tolerance else None
    for experts in find_experts(ffn.module):
        arguments: list[Called] = []
        points = {"experts": Point(experts.module, "output")}
        shared = _shared(ffn.module, experts.module)
        if shared is not None:
            points |= {"shared": Point(shared[0], "output"), "shared_act": Point(shared[1][2].module, "input")}
        again = alone.run(points=points, listen=[(arguments, experts.module)])
        args, kwargs = arguments[-1]
        x = hooks.first_tensor((*args, *kwargs.values()))
        assert x is not None
        parts = [experts.neurons(x[token], *visit) for visit in experts.visited(args, kwargs, token)]
        rest = whole - again["experts"][token]
        if shared is not None:
            # Its gate is one number for each token, whatever computes it.
            written = again["shared"][token]
            gate = float(rest @ written / (written @ written).clamp(min=1e-30))
            part = dense_neurons(*shared[1], again["shared_act"][token], "shared")
            bias = None if part.bias is None else part.bias * gate
            parts.append(replace(part, act=part.act * gate, bias=bias, weight=gate))
        if (torch.stack([_written(part) for part in parts]).sum(0) - whole).abs().max() <= tolerance:
            return FfnNeurons(tuple(parts), token, shared[1] if shared else None, experts, arguments)
    return None


def _written(part: Neurons) -> torch.Tensor:
    written = _written_by(part, part.act)
    return written if part.bias is None else written + part.bias


def _written_by(part: Neurons, act: torch.Tensor) -> torch.Tensor:
    """[d_model] what these activations write, without the bias."""
    return (part.down.float() @ act.to(part.down.device)).cpu()


def _shared(ffn: nn.Module, experts: nn.Module) -> tuple[nn.Module, tuple[Projection, Projection, Projection]] | None:
    """The expert that every token visits, where there is exactly one beside the others."""
    names = ("gate_proj", "up_proj", "down_proj")
    found = [
        (child, name)
        for name, child in ffn.named_children()
        if child is not experts and all(isinstance(getattr(child, part, None), nn.Linear) for part in names)
    ]
    if len(found) != 1:
        return None
    child, name = found[0]
    gate, up, down = (Projection(f"{name}.{part}", getattr(child, part)) for part in names)
    return child, (gate, up, down)
