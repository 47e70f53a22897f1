"""What is kept of an activation: per row its largest values with their places, its median, its norms.

Everything is float32 whatever the model's dtype, stays on the model's device, and asks nothing of the host, so
that a hook may call it for every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

MAP_TOKENS = 48
"""How many tokens from the start of each row keep their own maximum, for the picture of tokens by blocks."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What is kept of an activation [batch, seq, d_model]; every field but the last two has the batch in front."""

    values: torch.Tensor
    """[batch, k] the entries of largest magnitude, signed, largest first; NaN and infinity come before all. NaN where a
    row has fewer."""
    tokens: torch.Tensor
    """[batch, k] the token of each."""
    dims: torch.Tensor
    """[batch, k] the dimension of each."""
    median_abs: torch.Tensor
    """[batch] median |h| over the real tokens and all dimensions."""
    n_massive: torch.Tensor
    """[batch] how many entries meet the criterion."""
    top_norm: torch.Tensor
    """[batch] the norm of the token that holds the largest entry."""
    others_norm: torch.Tensor
    """[batch] the median norm of the other tokens; NaN where there is none."""
    n_non_finite: torch.Tensor
    """[batch] how many tokens hold a NaN or an infinity."""
    token_max: torch.Tensor
    """[batch, MAP_TOKENS] the largest |h| of each of the first tokens; NaN beyond the row's end."""
    massive_tokens: torch.Tensor
    """[batch, seq] whether each token holds an entry that meets the criterion, all of them; false in the padding."""
    massive_in_dim: torch.Tensor
    """[d_model] int64, how many entries of each dimension meet the criterion, over the rows that are finite."""
    massive_sum: torch.Tensor
    """[d_model] the sum of these entries."""

    def cpu(self) -> Summary:
        """The same on the host."""
        return Summary(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})


def stack(summaries: Sequence[Summary]) -> Summary:
    """Summaries of several layers as one, with the layer in front: one copy to the host for each field and device."""
    device = summaries[0].median_abs.device
    return Summary(
        **{
            field.name: torch.stack([getattr(summary, field.name).to(device) for summary in summaries])
            for field in fields(Summary)
        }
    )


def summarise(hidden: torch.Tensor, lengths: Sequence[int], *, min_abs: float, min_ratio: float, k: int) -> Summary:
    """The summary of an activation. Padding counts nowhere, and no row depends on another.

    Args:
        hidden: [batch, seq, d_model], padded on the right.
        lengths: The number of tokens of each row.
        min_abs: An entry is massive when |h| > min_abs and |h| > min_ratio * median |h| (Sun et al. 2024,
            arXiv:2402.17762).
        min_ratio: See `min_abs`.
        k: How many of the largest entries to keep.
    """
    seq = hidden.shape[1]
    k = min(k, seq * hidden.shape[2])  # there are no more, however many were asked for
    rows = [
        _summarise_row(hidden[row, :length].float(), seq, min_abs, min_ratio, k) for row, length in enumerate(lengths)
    ]
    *by_row, counts, sums = (torch.stack(column) for column in zip(*rows, strict=True))
    return Summary(*[*by_row, counts.sum(dim=0), sums.sum(dim=0)])


def _summarise_row(
    hidden: torch.Tensor, seq: int, min_abs: float, min_ratio: float, k: int
) -> tuple[torch.Tensor, ...]:
    n_tokens, d_model = hidden.shape
    magnitude = hidden.abs()
    token_max = magnitude.amax(dim=-1)
    # The k largest entries lie in the k tokens with the largest maxima: no sort of the whole activation.
    candidates = token_max.topk(min(k, n_tokens)).indices
    top = magnitude[candidates].flatten().topk(min(k, candidates.numel() * d_model)).indices
    tokens, dims = candidates[top // d_model], top % d_model
    values = hidden[tokens, dims]
    median = magnitude.flatten().median()
    bound = torch.clamp(min_ratio * median, min=min_abs)
    massive_tokens = token_max > bound
    # On the host only the few massive tokens are looked at again; to ask another device which these are would make it
    # wait, and a pass over its memory is cheap there.
    again = massive_tokens if hidden.device.type == "cpu" else slice(None)
    massive = magnitude[again] > bound
    n_non_finite = (~torch.isfinite(token_max)).sum()
    in_dim, of_dim = massive.sum(dim=0), torch.where(massive, hidden[again], 0.0).sum(dim=0)
    norms = torch.linalg.vector_norm(hidden, dim=-1)
    is_top = torch.arange(n_tokens, device=hidden.device) == tokens[0]
    others = torch.where(is_top, torch.nan, norms).nanmedian()
    return (
        _padded(values, k),
        _padded(tokens, k),
        _padded(dims, k),
        median,
        in_dim.sum(),
        norms[tokens[0]],
        others,
        n_non_finite,
        _padded(token_max[:MAP_TOKENS], MAP_TOKENS),
        torch.nn.functional.pad(massive_tokens, (0, seq - n_tokens)),
        torch.where(n_non_finite == 0, in_dim, 0),
        torch.where(n_non_finite == 0, of_dim, 0.0),
    )


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    if len(values) == length:
        return values
    fill = torch.nan if values.is_floating_point() else -1
    return torch.cat([values, values.new_full((length - len(values),), fill)])
