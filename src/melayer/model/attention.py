"""Ordinary attention that also tells how much chosen keys draw, without the [T, T] matrix.

The kernels of scaled-dot-product attention know the log-sum-exp of each query's scores. With it the attention that
one key draws is A[t, k] = exp(scale * q_t . k_k - lse_t), which costs O(T d) for a key. The function is registered
with transformers under a name of its own, so no modelling code is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from melayer.errors import ArchitectureError
from melayer.model.decoder import Decoder

NAME = "melayer_keys"
_CHUNK = 256  # queries at once where the scores have to be written out: [_CHUNK, T] is the most that is built


@dataclass(eq=False)
class _Listening:
    """What the attention function needs to know about the batch at hand, and where it leaves what it found."""

    layers: dict[int, int]
    """id of the attention module -> layer"""
    keys: torch.Tensor
    """[batch, n_keys] positions, -1 for none"""
    real: torch.Tensor
    """[batch, seq] whether a position is a token"""
    drawn: dict[int, torch.Tensor] = field(default_factory=dict)


_listening: list[_Listening] = []


@contextmanager
def listen(
    decoder: Decoder, keys: Sequence[Sequence[int]], attention_mask: torch.Tensor
) -> Iterator[Callable[[], dict[int, torch.Tensor]]]:
    """Makes the model's attention report what `keys` draw, for one forward pass inside the context.

    The model's output stays what it was to float tolerance; its settings are put back afterwards, also by an
    exception.

    Args:
        decoder: The model's parts.
        keys: For each row the positions to report on.
        attention_mask: [batch, seq], 1 for a token and 0 for padding, on either side.

    Yields:
        A function that returns, for each layer with softmax attention, [batch, n_heads, n_keys] the mean of A[t, k]
        over the real queries t >= k (alpha_k of Gu et al. 2024, arXiv:2410.10781); NaN where a row has fewer keys.

    Raises:
        ArchitectureError: No block has softmax attention, or one does not go through transformers' interface.
    """
    attentions = {block.layer: block.attention for block in decoder.blocks if block.attention is not None}
    if not attentions:
        raise ArchitectureError(
            f"No block of this model ({decoder.family}) has softmax attention, so there are no attention sinks to "
            "measure. locate and rigidity work on it."
        )
    most = max(map(len, keys))
    listening = _Listening(
        {id(module): layer for layer, module in attentions.items()},
        torch.tensor([[*row, *[-1] * (most - len(row))] for row in keys]),
        attention_mask.bool(),
    )

    def found() -> dict[int, torch.Tensor]:
        silent = sorted(set(attentions) - set(listening.drawn))
        if silent:
            raise ArchitectureError(
                f"The attention of block {silent[0]} ({type(attentions[silent[0]]).__name__}) does not go through "
                "transformers' attention interface, so its log-sum-exp cannot be had. Use a model class that does."
            )
        return listening.drawn

    with _implementation(decoder, attentions.values(), lambda _: NAME):
        _listening.append(listening)
        try:
            yield found
        finally:
            _listening.pop()


@contextmanager
def watch_heads(decoder: Decoder, see: Callable[[int, str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see(layer, "q" | "k" | "v", tensor)` with what the attention kernel of each block reads.

    That is after rotary positions and the norms of queries and keys: what a cache holds. The kernel is the model's
    own, except that eager attention becomes one that never holds [T, T] (equal to float tolerance).

    Args:
        decoder: The model's parts.
        see: Receives the block, the name and the tensor [batch, n_heads, seq, d], in which it must not write.
    """
    layers = {id(block.attention): block.layer for block in decoder.blocks if block.attention is not None}

    def named(implementation: str) -> str:
        name = f"{NAME}_before_{implementation}"
        own = implementation in ALL_ATTENTION_FUNCTIONS.valid_keys()
        AttentionInterface.register(name, _showing(ALL_ATTENTION_FUNCTIONS[implementation] if own else _attend))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation] if own else sdpa_mask)
        return name

    with _implementation(decoder, [block.attention for block in decoder.blocks if block.attention is not None], named):
        _watching.append((layers, see))
        try:
            yield
        finally:
            _watching.pop()


_watching: list[tuple[dict[int, int], Callable[[int, str, torch.Tensor], None]]] = []


def _showing(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function that shows what it reads to whoever watches."""

    def attend_and_show(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layers, see = _watching[-1]
        if id(module) in layers:
            for name, tensor in (("q", query), ("k", key), ("v", value)):
                see(layers[id(module)], name, tensor)
        return attend(module, query, key, value, *args, **kwargs)

    return attend_and_show


@contextmanager
def _implementation(decoder: Decoder, attentions: Any, named: Callable[[str], str]) -> Iterator[None]:
    """The attention function of another name, given the model's own, in its place."""
    modules = [*attentions, *(m for m in decoder.model.modules() if hasattr(m, "config"))]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key, config in configs.items():
            config._attn_implementation = named(before[key])
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query [batch, n_heads, seq, d], key and value [batch, n_kv_heads, seq, d]."""
    if others.get("position_bias") is not None:
        raise ArchitectureError(
            f"{type(module).__name__} adds a position bias to its scores, which sinks do not know. "
            "Measure a model without one (ALiBi and T5 biases are not supported)."
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        out, lse = _flash(query, key, value, attention_mask, scale)
    else:
        out, lse = _in_chunks(query, key, value, attention_mask, scale, softcap)
    if s_aux is not None:
        # A learned logit that draws attention and gives nothing (gpt-oss): one more term in each sum.
        whole = torch.logaddexp(lse, s_aux.float().view(1, -1, 1))
        out = out * (lse - whole).exp().unsqueeze(-1).to(out.dtype)
        lse = whole
    listening = _listening[-1] if _listening else None
    if listening is not None and id(module) in listening.layers:
        drawn = _drawn(query, key, lse, attention_mask, scale, softcap, listening)
        listening.drawn[listening.layers[id(module)]] = drawn
    return out.transpose(1, 2).contiguous(), None


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp [batch, n_heads, seq] from the CPU kernel that plain SDPA runs too."""
    added = None
    if mask is not None:
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None, attn_mask=added, scale=scale
    )
    return out, lse


def _in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where no kernel tells the log-sum-exp, or the scores are capped: some queries at a time."""
    _, n_heads, n_tokens, _ = query.shape
    groups = n_heads // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    positions = torch.arange(n_tokens, device=query.device)
    outs, sums = [], []
    for start in range(0, n_tokens, _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = _capped((query[:, :, rows] @ key.transpose(2, 3)).float() * scale, softcap)
        seen = positions[rows, None] >= positions if mask is None else mask[:, :, rows]
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(dim=-1)
        # A padded query may see nothing; its output is never read.
        weights = (scores - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
        outs.append(weights.to(value.dtype) @ value)
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _drawn(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    listening: _Listening,
) -> torch.Tensor:
    """[batch, n_heads, n_keys] the mean of A[t, k] over the real queries t >= k."""
    batch, n_heads, n_tokens, size = query.shape
    places = listening.keys.to(query.device)
    real = listening.real.to(query.device)
    chosen = places.clamp(min=0)
    groups = n_heads // key.shape[1]
    picked = key.gather(2, chosen[:, None, :, None].expand(-1, key.shape[1], -1, size))
    grouped = query.reshape(batch, key.shape[1], groups, n_tokens, size)
    scores = torch.einsum("bkgtd,bknd->bkgtn", grouped.float(), picked.float()) * scale
    weights = (_capped(scores, softcap).flatten(1, 2) - lse.float().unsqueeze(-1)).exp()
    positions = torch.arange(n_tokens, device=query.device)
    # [batch, seq, n_keys]: the queries that the mean is over; of these, a window may hide the key from some.
    counted = (positions[None, :, None] >= places[:, None, :]) & real.unsqueeze(-1)
    seen = counted.unsqueeze(1)
    if mask is not None:
        columns = mask.expand(batch, -1, -1, -1).gather(
            3, chosen[:, None, None, :].expand(-1, mask.shape[1], n_tokens, -1)
        )
        seen = seen & columns
    sums = torch.where(seen, weights, 0.0).sum(dim=2)
    means: torch.Tensor = sums / counted.sum(dim=1).unsqueeze(1)
    return torch.where((places >= 0).unsqueeze(1), means, torch.nan)


AttentionInterface.register(NAME, _attend)
# Under the same name, or transformers would build the masks of another kernel.
AttentionMaskInterface.register(NAME, sdpa_mask)
