"""Token ids and the rows of the embedding that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from melayer.errors import InputError


def require_rows(ids: torch.Tensor, embedding: nn.Module, model: nn.Module) -> None:
    """Raises InputError unless the embedding has a row for each id.

    On a GPU a lookup beyond the embedding ends the process, and anywhere else it is an IndexError that names nothing.

    Args:
        ids: [...] token ids.
        embedding: The model's, whose weight is [n_tokens, d].
        model: Whose it is.
    """
    n_rows = rows_of(embedding)
    if n_rows is None or ids.device.type == "meta" or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= n_rows:
        raise InputError(
            f"Token id {int(high if high >= n_rows else low)} was given to {type(model).__name__}, whose embedding has "
            f"{n_rows:,} rows: the tokenizer is another model's, or knows tokens that were added to it alone. Give the "
            "tokenizer that the model was trained with, or texts without such tokens."
        )


def rows_of(embedding: nn.Module) -> int | None:
    """For how many token ids an embedding has a row; None where it does not say."""
    weight: Any = getattr(embedding, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
