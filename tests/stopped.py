"""Runs that end before the last block, by the test's own hook."""

from collections.abc import Callable

import torch
from torch import nn

import toys
from melayer.data.rows import Batch


class _StoppedError(RuntimeError):
    pass


def after(layer: int) -> Callable[[nn.Module, Batch], None]:
    """What runs a batch, up to the output of this block."""

    def run_batch(model: nn.Module, batch: Batch) -> None:
        def stop(module: nn.Module, args: tuple, output: object) -> None:
            raise _StoppedError

        # Behind all who watch the block, since they were there before.
        handle = toys.blocks(model)[layer].register_forward_hook(stop)
        try:
            with torch.no_grad():
                model(batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        except _StoppedError:
            return
        finally:
            handle.remove()
        raise AssertionError("it ran to the end")

    return run_batch
