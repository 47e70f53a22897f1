"""Tensors that hooks left where the blocks are, brought to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def stacked(tensors: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Tensors of equal shape as one array with them in front: one copy to the host, whatever their devices.

    The host has float64 whatever the device, and 1 - 0.99999 is a difference of nearly equal numbers.
    """
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).cpu().numpy().astype(np.float64)
