"""Ordinary attention that also tells how much chosen keys draw, without the [T, T] matrix, and what it reads.

The kernels of scaled-dot-product attention know the log-sum-exp of each query's scores. With it the attention that
one key draws is A[t, k] = exp(scale * q_t . k_k - lse_t), which costs O(T d) for a key. The functions are registered
with transformers under names of their own, so no modelling code is touched; for whom they work is kept with the
attention module itself, so that contexts on two models, in two threads or in one another do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from melayer.errors import ArchitectureError, InputError
from melayer.model import hooks
from melayer.model.decoder import Decoder

NAME = "melayer_keys"
_CHUNK = 256  # queries at once where the scores have to be written out: [_CHUNK, T] is the most that is built
_KEYS = 16  # keys at once that are reported on: with hundreds in a row their scores would be [T, T] again


@dataclass(eq=False)
class _Listening:
    """What the attention function needs to know about the batch at hand, and where it leaves what it found."""

    keys: torch.Tensor
    """[batch, n_keys] positions, -1 for none"""
    real: torch.Tensor
    """[batch, seq] whether a position is a token"""
    drawn: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer."""


Watcher = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class _Audience:
    """Who wants to know what about one attention module."""

    layer: int = -1
    listening: _Listening | None = None
    """The innermost context of `listen`."""
    watchers: tuple[Watcher, ...] = ()
    """Those of all contexts of `watch_heads`."""


_audiences: WeakKeyDictionary[nn.Module, _Audience] = WeakKeyDictionary()


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
    attentions = _attentions(decoder)
    if not attentions:
        raise ArchitectureError(
            f"No block of this model ({decoder.family}) has softmax attention, so there are no attention sinks to "
            "measure. locate and rigidity work on it."
        )
    most = max(map(len, keys))
    listening = _Listening(
        torch.tensor([[*row, *[-1] * (most - len(row))] for row in keys]),
        attention_mask.bool(),
    )

    def drawn() -> dict[int, torch.Tensor]:
        silent = sorted(set(attentions) - set(listening.drawn))
        if silent:
            raise ArchitectureError(
                f"The attention of block {silent[0]} ({type(attentions[silent[0]]).__name__}) does not go through "
                "transformers' attention interface, so its log-sum-exp cannot be had. Use a model class that does."
            )
        return listening.drawn

    audiences = {
        module: replace(_audiences.get(module, _Audience()), layer=layer, listening=listening)
        for layer, module in attentions.items()
    }
    with _implementation(decoder, attentions.values(), lambda _: _listening_name()), _told(audiences):
        yield drawn


@contextmanager
def watch_heads(decoder: Decoder, see: Callable[[int, str, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see(layer, "q" | "k" | "v", tensor)` with what the attention kernel of each block reads.

    That is after rotary positions and the norms of queries and keys: what a cache holds. The kernel is the model's
    own, except that eager attention becomes one that never holds [T, T] (equal to float tolerance).

    Args:
        decoder: The model's parts.
        see: Receives the block, the name and the tensor [batch, n_heads, seq, d], in which it must not write.
    """
    attentions = _attentions(decoder)
    audiences = {}
    for layer, module in attentions.items():
        before = _audiences.get(module, _Audience())
        audiences[module] = replace(before, layer=layer, watchers=(*before.watchers, partial(see, layer)))
    with _implementation(decoder, attentions.values(), _watching_name), _told(audiences):
        yield


def _attentions(decoder: Decoder) -> dict[int, nn.Module]:
    """The softmax attentions by layer."""
    return {block.layer: block.attention for block in decoder.blocks if block.attention is not None}


@contextmanager
def _told(audiences: Mapping[nn.Module, _Audience]) -> Iterator[None]:
    """The modules have these audiences inside the context, and those that they had before afterwards."""
    before = {module: _audiences.get(module) for module in audiences}
    _audiences.update(audiences)
    try:
        yield
    finally:
        for module, audience in before.items():
            if audience is None:
                del _audiences[module]
            else:
                _audiences[module] = audience


def _listening_name() -> str:
    """The name of the attention function that listens, registered by its first use."""
    AttentionInterface.register(NAME, _attend)
    # Under the same name, or transformers would build the masks of another kernel.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def _watching_name(implementation: str) -> str:
    """The name of the attention function that shows what it reads and then does as the model's own."""
    if implementation.startswith(NAME):
        return implementation  # one of ours already, which shows too
    if implementation not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return _listening_name()  # eager
    name = f"{NAME}_before_{implementation}"
    AttentionInterface.register(name, _showing(implementation))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _showing(implementation: str) -> Callable[..., Any]:
    """The attention function that shows what it reads to whoever watches."""

    def attend_and_show(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        _show(module, query, key, value)
        return ALL_ATTENTION_FUNCTIONS[implementation](module, query, key, value, *args, **kwargs)

    return attend_and_show


def _show(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    audience = _audiences.get(module)
    if audience is not None:
        for see in audience.watchers:
            for name, tensor in (("q", query), ("k", key), ("v", value)):
                see(name, tensor)


@contextmanager
def _implementation(decoder: Decoder, attentions: Iterable[nn.Module], named: Callable[[str], str]) -> Iterator[None]:
    """The attention function of another name, given the model's own, in its place."""
    configs: dict[int, PreTrainedConfig] = {}
    for module in (*attentions, *decoder.model.modules()):
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
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
    if hooks.checkpoint_around() is not None and not hooks.in_backward():
        raise InputError(
            "Heads cannot be watched under gradient checkpointing where that takes another attention function than the "
            "model's own: the backward pass could run it again when nobody watches. Use attn_implementation='sdpa', or "
            "turn checkpointing off meanwhile."
        )
    _show(module, query, key, value)
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
    audience = _audiences.get(module)
    if audience is not None and audience.listening is not None:
        listening = audience.listening
        drawn = [
            _drawn(query, key, lse, attention_mask, scale, softcap, replace(listening, keys=keys))
            for keys in torch.split(listening.keys, _KEYS, dim=1)
        ]
        listening.drawn[audience.layer] = torch.cat(drawn, dim=2)
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
