"""A model whose linear maps round by themselves, to hold the rounding against."""

import contextlib

import torch

from melayer.numerics.grids import quantised, scales


def flags(n=3, length=9):
    found = torch.zeros(n, length, dtype=torch.bool)
    found[:, 0] = True
    return found


@contextlib.contextmanager
def replaced(model, found, format, granularity, steps):
    """Each linear map rounds what it reads by itself; yields {name: (what it read, what that became)}."""
    seen, originals = {}, {}
    for place, at in enumerate(found):
        for name in at.names:
            module = model.get_submodule(name)
            originals[module] = module.forward

            def rounding(x, module=module, name=name, place=place):
                if granularity == "per-token":
                    scale = scales(x.float().abs().amax(-1, keepdim=True), format)
                else:
                    scale = steps[place]
                became = quantised(x, scale, format)
                seen[name] = (x.float(), became)
                return originals[module](became.to(x.dtype))

            module.forward = rounding
    try:
        yield seen
    finally:
        for module in originals:
            del module.forward
