"""Toys whose attention is far from uniform."""

import torch

import toys


def sharp(family: str, **changes):
    """A toy whose heads differ: queries and keys are scaled up until some attention is far from even."""
    changes = {"n_positions" if family == "gpt2" else "max_position_embeddings": 600} | changes
    model = toys.make(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value", "c_attn")):
                parameter.mul_(3.0)
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, len(parameter)))
    return model
