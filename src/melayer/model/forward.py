"""Tokens through the model, for those who watch: a batch, or the few that tell how it is built."""

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
    """Runs a batch through the model for those who watch; nothing is returned and nothing is learnt.

    Raises:
        InputError: A token is not the model's.
    """
    device = input_device(model)
    inputs = {"input_ids": batch.ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    # One row of logits is enough: nothing here looks at them, and all of them can outweigh the model.
    with hooks.measuring(model):
        model(**inputs, use_cache=False, logits_to_keep=1)


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """The token embedding [n_tokens, d]; on the meta device where it is offloaded."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go; the host where the embedding is offloaded, since accelerate moves them from there."""
    device = embedding_weight(model).device
    return torch.device("cpu") if device.type == "meta" else device


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """[2, 4] token ids that tell how a model is built.

    The rows differ in the last token only: what a causal model makes of the others is the same.
    """
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=input_device(model))
    return ids % embedding_weight(model).shape[0]
