"""Toys under a mask, and how their outputs are compared."""

import torch

import toys
from melayer.interventions.mask import WeMask

ME = 3


TEXT = [toys.X, *range(5, 17)]


def model_of(family, **options):
    """A toy with gammas that differ, attention that matters, and a massive activation on X."""
    model = toys.plant(toys.make(family, **options), [(ME, 7, 3000.0)])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in toys.blocks(model):
            for name, parameter in block.named_parameters():
                if "norm" in name and "input" in name and parameter.ndim == 1:
                    parameter.add_(0.2 * torch.rand(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def mask_of(**options):
    return WeMask(**{"rate": 0.5, "selector": "random", "me_layer": ME, **options})


def logits(model, rows, mask=None, **options):
    ids = torch.as_tensor(rows)
    ids = ids[None] if ids.ndim == 1 else ids
    with torch.no_grad():
        if mask is None:
            return model(ids, **options).logits
        with mask.apply(model):
            return model(ids, **options).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


ROWS = [TEXT, [toys.X, 9, 8, 21], [30, 31, 32, 33, 34, 35, 36]]


def padded(side):
    width = max(map(len, ROWS))
    ids, mask = torch.zeros(len(ROWS), width, dtype=torch.long), torch.zeros(len(ROWS), width, dtype=torch.long)
    for place, row in enumerate(ROWS):
        at = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[place, at], mask[place, at] = torch.tensor(row), 1
    return ids, mask
