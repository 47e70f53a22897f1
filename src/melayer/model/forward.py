"""One batch through the model, for those who watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from melayer.data.rows import Batch
from melayer.model import hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel
Run = Callable[["PreTrainedModel", Batch], None]
"""Runs a batch through the model for those who watch."""


def forward(model: PreTrainedModel, batch: Batch) -> None:
    """Runs a batch through the model for those who watch; nothing is returned and nothing is learnt."""
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate moves the inputs where they are needed
        device = torch.device("cpu")
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    # One row of logits is enough: nothing here looks at them, and all of them can outweigh the model.
    with hooks.measuring(model):
        model(**inputs, use_cache=False, logits_to_keep=1)
