"""The loss of every token, without keeping the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from melayer.data.rows import Batch
from melayer.errors import ArchitectureError
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import input_device
from melayer.model.hooks import Point

if TYPE_CHECKING:
    from transformers import Cache

_LOGITS = 2**25  # values in one chunk of logits: 128 MB in float32, whatever the vocabulary


def losses(decoder: Decoder, batch: Batch, *, cache: Cache | None = None) -> torch.Tensor:
    """[predicted tokens] the negative log-likelihoods of a batch of equally long rows, float32 on the host.

    With a cache, the rows go on from what it holds, one row of it for each.

    The blocks run once. The logits are then made a chunk at a time by handing stretches of what the head read to
    the model's own forward pass, called on a single token: so capping and scaling of logits are the family's.
    """
    if decoder.head is None:
        raise ArchitectureError(f"This model ({decoder.family}) has no head, so there are no logits to predict with.")
    read: list[torch.Tensor] = []
    stretch: list[torch.Tensor] = []

    def swap(_: int, hidden: torch.Tensor) -> torch.Tensor:
        if stretch:
            return stretch[0].to(hidden.device)
        read.append(hidden)
        return hidden[:, :1]

    model = decoder.model
    device = input_device(model)
    ids = batch.ids.to(device)
    parts = []
    with hooks.measuring(model), hooks.edit([(0, Point(decoder.head, "input"))], swap):
        if cache is None:
            first = model(ids, attention_mask=batch.attention_mask.to(device), use_cache=False).logits
        else:
            first = model(ids, use_cache=True, **{hooks.cache_argument(model): cache}).logits
        states, targets = read[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(first.device)
        step = max(1, _LOGITS // first.shape[-1])
        for start in range(0, len(targets), step):
            stretch[:] = [states[None, start : start + step]]
            logits = model(ids[:1, :1], use_cache=False).logits[0]
            parts.append(cross_entropy(logits.float(), targets[start : start + step], reduction="none").cpu())
    return torch.cat(parts)
