"""Experts kept as one tensor, as transformers keeps them: the neurons of those that a token visits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from melayer.measurements.explain.neurons import Neurons, Scale
from melayer.model import hooks
from melayer.model.hooks import Point
from melayer.model.isolated_block import Called, Edit


@dataclass(frozen=True, eq=False)
class Experts:
    """A module that keeps all its experts in 3-D tensors and is told which ones each token visits."""

    module: nn.Module
    interleaved: bool
    """Stored [experts, in, out] with gate and up in turns and clamped (gpt-oss); else [experts, out, in] in halves."""

    def visited(self, called: Called, token: int) -> list[tuple[int, float]]:
        """Which experts the token visits, with its routing weights, from what the module was called with."""
        args, kwargs = called
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
            new = out.clone()
            x = read_by(arguments[-1])[token]
            for expert, weight in self.visited(arguments[-1], token):
                plain = self.neurons(x, expert, weight)
                scale = scale_of(plain)
                other = self.neurons(x, expert, weight, scale)
                new[token] += plain.written_by(other.act * scale.down - plain.act).to(out)
            return new

        return Point(self.module, "output"), change


def read_by(called: Called) -> torch.Tensor:
    """[seq, d_model] the hidden states among what a module was called with."""
    args, kwargs = called
    x = hooks.first_tensor((*args, *kwargs.values()))
    assert x is not None
    return x


def find_experts(ffn: nn.Module) -> list[Experts]:
    """The ways to read the experts inside an FFN; which one is right, the recorded output decides."""
    readings = []
    for module in ffn.modules():
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == down.ndim == 3:
            if gate_up.shape[1] == 2 * down.shape[2] and hasattr(module, "act_fn"):
                readings.append(Experts(module, interleaved=False))
            if gate_up.shape[2] == 2 * down.shape[1] and hasattr(module, "alpha") and hasattr(module, "limit"):
                readings.append(Experts(module, interleaved=True))
    return readings


def _on(factor: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    return factor.to(like.device) if isinstance(factor, torch.Tensor) else factor
