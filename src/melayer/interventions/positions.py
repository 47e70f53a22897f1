"""Which tokens of a batch are the first of their sequence, from what the model is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from melayer.errors import InputError


@dataclass(frozen=True, eq=False)
class Positions:
    """Two flags for each token of one call."""

    first: torch.Tensor | None
    """[batch, seq] whether it is the first real token of its sequence; None where none is."""
    real: torch.Tensor | None
    """[batch, seq] whether it is a token and not padding; None where all are."""


def positions(
    shape: tuple[int, int],
    *,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    past: int = 0,
    device: torch.device | None = None,
) -> Positions:
    """The first real token of each sequence, in plain, padded and packed batches, whole, in chunks and with a cache.

    Args:
        shape: (batch, seq) of the tokens at hand.
        attention_mask: [batch, past + seq] with 1 for a token and 0 for padding; or what a static cache takes,
            [batch, 1, seq, keys] (or one of each kind by name), true or 0.0 where a query sees a key; or None.
        position_ids: [batch or 1, seq]; in a packed row they start again from 0 with each sequence.
        past: Tokens that the cache holds already.
        device: Where the flags go.

    Raises:
        InputError: The mask is of a kind that does not tell padding from tokens.
    """
    batch, seq = shape
    mask = _chosen(attention_mask)
    if mask is not None and mask.ndim == 4:
        return _from_visibility(mask, shape, past)
    if mask is None:
        if past:
            return Positions(None, None)
        first = torch.zeros(shape, dtype=torch.bool, device=device)
        first[:, 0] = True
        return Positions(_with_restarts(first, position_ids), None)
    if mask.ndim != 2:
        raise InputError(
            f"The attention mask has {mask.ndim} dimensions; expected [batch, seq], or [batch, 1, seq, keys]. "
            "Give the tokenizer's own."
        )
    # A mask of the tokens at hand alone says nothing about those in the cache: there the sequences have begun.
    whole = mask.shape[1] >= past + seq
    begun = mask[:, :past].bool().any(dim=1) if whole else torch.full((batch,), past > 0, device=mask.device)
    if past and bool(begun.all()):
        return Positions(None, mask[:, past : past + seq].bool() if whole else mask.bool())
    real = (mask[:, past : past + seq] if whole else mask[:, -seq:]).bool()
    first = real & (real.cumsum(dim=1) == 1) & ~begun[:, None]
    if not past:
        first = _with_restarts(first, position_ids) & real
    return Positions(first, real)


def _chosen(attention_mask: Any) -> torch.Tensor | None:
    """The mask itself; of several by kind of attention the one without a window, which hides no token."""
    if isinstance(attention_mask, Mapping):
        by_name = [attention_mask.get("full_attention"), *attention_mask.values()]
        attention_mask = next((mask for mask in by_name if mask is not None), None)
    if attention_mask is None or isinstance(attention_mask, torch.Tensor):
        return attention_mask
    raise InputError(
        f"The attention mask is a {type(attention_mask).__name__}, which does not tell padding from tokens. "
        "Use attn_implementation='sdpa' or 'eager' under a mask."
    )


def _with_restarts(first: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """The flags [batch, seq], set too where positions start from 0 again."""
    if position_ids is None:
        return first
    # Models with several kinds of positions (time, height, width) have them in front; text has them all alike.
    flat = position_ids[0] if position_ids.ndim == 3 else position_ids
    return first | (flat == 0).to(first.device)


def _from_visibility(mask: torch.Tensor, shape: tuple[int, int], past: int) -> Positions:
    """The first token of a sequence is the one that sees itself alone; padding does not see itself."""
    batch, seq = shape
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    if visible.shape[-1] < past + seq:
        return Positions(None, None)  # a window's cache that has lost the beginning
    itself = visible.diagonal(past, dim1=1, dim2=2)[:, :seq]
    first = itself & (visible.sum(dim=-1) == 1)
    return Positions(first.expand(shape), itself.expand(batch, seq))
