"""A toy with hundreds of massive scalars at each block: many tokens, each massive in many dimensions.

Nothing here uses melayer: the truth is computed from activations that hooks of our own have stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import toys
from sharp_attention import sharp

LAYER = 3
LOUD = tuple(range(40, 52))
"""The ids of the tokens that become massive."""
DIMS = tuple(range(20, 56))


def model() -> nn.Module:
    """One neuron of block 3 hears every loud token, each with another strength, and writes 36 dimensions."""
    made = sharp("llama")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        embedding = made.get_input_embeddings().weight
        embedding[:, toys.LISTEN] = 0.0
        for place, token in enumerate(LOUD):
            embedding[token, toys.LISTEN] = 15.0 + place
        block = toys.blocks(made)[LAYER]
        for reader in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
            reader[toys.NEURON] = 0.0
            reader[toys.NEURON, toys.LISTEN] = 3.0
        strength = 8.0 + 8.0 * torch.rand(len(DIMS), generator=generator)
        block.mlp.down_proj.weight[list(DIMS), toys.NEURON] = strength * torch.tensor([1.0, -1.0]).repeat(
            len(DIMS) // 2
        )
    return made


def texts() -> list[str]:
    """Two texts of 40 tokens and one of 30, ten or so of them loud."""
    made = []
    for seed, length in enumerate((40, 40, 30)):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 38, (length,), generator=generator).tolist()
        for place in torch.randperm(length, generator=generator)[: 9 + seed].tolist():
            ids[place] = LOUD[place % len(LOUD)]
        made.append(" ".join(toys.tokenizer().convert_ids_to_tokens(ids)))
    return made


@dataclass(frozen=True)
class Truth:
    """One text's activations, and what is massive in them."""

    ids: list[int]
    states: NDArray[np.float64]
    """[n_layers, seq, d_model] at each block's output"""
    massive: NDArray[np.bool_]
    """[n_layers, seq, d_model]"""

    def tokens_from(self, layer: int) -> set[int]:
        """The tokens that hold a massive scalar at the output of this block or of a later one."""
        return set(np.flatnonzero(self.massive[layer:].any(axis=(0, 2))).tolist())

    def tokens_at(self, layer: int) -> list[int]:
        """Those that do so at the output of this block."""
        return np.flatnonzero(self.massive[layer].any(axis=1)).tolist()


def truth(made: nn.Module, text: str) -> Truth:
    """What hooks of our own have seen."""
    ids = toys.tokenizer()(text)["input_ids"]
    states = []
    handles = [
        block.register_forward_hook(
            lambda module, args, output: states.append((output if torch.is_tensor(output) else output[0])[0])
        )
        for block in toys.blocks(made)
    ]
    with torch.no_grad():
        made(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    stored = torch.stack(states).float()
    bound = torch.stack([1000.0 * state.abs().flatten().median() for state in stored]).clamp(min=100.0)
    return Truth(ids, stored.double().numpy(), (stored.abs() > bound[:, None, None]).numpy())
