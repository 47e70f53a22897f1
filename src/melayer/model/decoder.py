"""One view of a decoder: its blocks with their parts and sites, whatever the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from melayer.errors import ArchitectureError
from melayer.model.hooks import Point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Site = Literal["block_in", "attn_in", "attn_act", "attn_out", "mid", "ffn_in", "ffn_act", "ffn_out", "block_out"]
SITES: tuple[Site, ...] = (
    "block_in",
    "attn_in",
    "attn_act",
    "attn_out",
    "mid",
    "ffn_in",
    "ffn_act",
    "ffn_out",
    "block_out",
)


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation layer with its effective scale."""

    name: str
    """Its path within the block (the final norm's: within the model)."""
    module: nn.Module

    def gamma(self, d_model: int) -> torch.Tensor:
        """The effective scale [d_model], float32: what a normalised value is multiplied by.

        Measured on the module rather than read from its weight, since families differ in what they store
        (Gemma and Qwen3-Next store gamma - 1).
        """
        if isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            weight = self.module.weight
            return torch.ones(d_model) if weight is None else weight.detach().float()
        # Zero mean and a mean square of 1, so that RMSNorm and LayerNorm both return it unchanged before gamma;
        # the size makes eps vanish. The odd part of the response drops a bias.
        probe = torch.ones(d_model, dtype=torch.float32)
        probe[1::2] = -1.0
        if d_model % 2:
            probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
        probe = probe * (d_model / probe.square().sum()).sqrt() * 1e4
        device = next((p.device for p in self.module.parameters() if p.device.type != "meta"), None)
        with torch.no_grad():
            probe = probe.to(device)[None, None]
            response = (self.module(probe) - self.module(-probe))[0, 0].float() / 2
        gamma: torch.Tensor = response / probe[0, 0] * 1e4
        return gamma


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map inside an FFN: a module, or the rows of one that holds several (Phi-3's `gate_up_proj`)."""

    name: str
    module: nn.Module
    part: Literal["whole", "first half", "second half"] = "whole"

    def weight(self) -> torch.Tensor:
        """The matrix [out, in], in the model's dtype; a view, not a copy."""
        weight = self.module.weight
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise ArchitectureError(
                f"{self.name} ({type(self.module).__name__}) holds no plain weight matrix [out, in]. "
                "Load the model without quantisation and without adapters."
            )
        # transformers' Conv1D (GPT-2) stores [in, out] and says so by its `nf` outputs.
        matrix = weight.detach().T if hasattr(self.module, "nf") else weight.detach()
        if self.part == "whole":
            return matrix
        first, second = matrix.chunk(2)
        return first if self.part == "first half" else second

    def bias(self) -> torch.Tensor | None:
        """The bias [out]; None where it has none."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, torch.Tensor):
            return None
        if self.part == "whole":
            return bias.detach()
        first, second = bias.detach().chunk(2)
        return first if self.part == "first half" else second


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The FFN of a block: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where there is no gate."""

    name: str
    module: nn.Module
    kind: Literal["gated", "plain", "experts", "unknown"]
    gate: Projection | None = None
    up: Projection | None = None
    down: Projection | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: its modules, and the sites that it has."""

    layer: int
    """0-based."""
    module: nn.Module
    mixer: nn.Module
    """What moves information between tokens: softmax attention, or a linear or recurrent one."""
    attention: nn.Module | None
    """The mixer where it is softmax attention, else None."""
    ffn: FeedForward | None
    attn_norm: Norm | None
    attn_post_norm: Norm | None
    ffn_norm: Norm | None
    ffn_post_norm: Norm | None
    parallel: bool
    """Whether attention and FFN both read `block_in`, so that there is no `mid`."""
    sites: Mapping[Site, Point]
    """Where each site can be seen. A site that this block does not have is not in here."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """One view of a causal language model."""

    model: PreTrainedModel
    stack: nn.Module
    """What runs the blocks, and is given the ids, the mask, the positions and the cache."""
    embedding: nn.Module
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    head: nn.Module | None
    d_model: int
    family: str
    """`config.model_type`: a label for people, never read by the code."""
    max_positions: int | None
    """How many tokens the model was made for; None where its config does not say."""

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def embedding_output(self) -> Point:
        """The embedding's site: what enters block 0, positions and scaling included."""
        return Point(self.blocks[0].module, "input")


def plain_model(model: PreTrainedModel | Decoder) -> PreTrainedModel:
    """The model itself, where its parts may have been read before."""
    return model.model if isinstance(model, Decoder) else model
