"""The value of a block when it runs again with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from melayer.measurements.explain.block_on_text import BlockOnText
from melayer.measurements.explain.figures import Counterfactual
from melayer.model.hooks import Point
from melayer.model.isolated_block import Edit, flat, permuted, zeroed
from melayer.numerics.finite import ratio

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""How far gamma is moved towards its mean."""
REMOVED = (1, 2, 5, 10)
"""How many of the heaviest neurons are removed."""


def counterfactuals(text: BlockOnText, seeds: int) -> list[Counterfactual]:
    """The value in each counterfactual; one that is not finite is left out.

    Args:
        text: The block on a text.
        seeds: How many permutations of gamma to try.
    """
    rows = [
        *(_with(text, name, edits) for name, edits in _pre_norm(text)),
        _permuted(text, seeds),
        *(_with(text, name, edits) for name, edits in _other_norms(text)),
        *(_with(text, name, edits) for name, edits in _neurons(text)),
        *(_with(text, name, edits) for name, edits in _branches(text)),
    ]
    return [row for row in rows if row is not None]


def interaction(rows: Sequence[Counterfactual]) -> float | None:
    """Effect of flat gamma and no top two neurons, less both effects alone; None where one was not run."""
    effects = {row.name: 1.0 - row.relative for row in rows if row.relative is not None}
    names = ("gamma_flat+no_top_2", "gamma_flat_1.0", "no_top_2")
    if not all(name in effects for name in names):
        return None
    both, gamma, neurons = (effects[name] for name in names)
    return both - gamma - neurons


def _with(text: BlockOnText, name: str, edits: list[Edit]) -> Counterfactual | None:
    value = text.value(edits)
    return Counterfactual(name, value, ratio(value, text.at("block_out"))) if math.isfinite(value) else None


def _permuted(text: BlockOnText, seeds: int) -> Counterfactual | None:
    """Mean, smallest and largest value over the permutations of the pre-norm's gamma."""
    norm = text.block.ffn_norm
    if norm is None:
        return None
    values = [text.value(text.gamma(norm, permuted(seed))) for seed in range(seeds)]
    if not all(map(math.isfinite, values)):
        return None
    mean = sum(values) / len(values)
    return Counterfactual("gamma_permuted", mean, ratio(mean, text.at("block_out")), min(values), max(values))


def _pre_norm(text: BlockOnText) -> Iterator[tuple[str, list[Edit]]]:
    norm = text.block.ffn_norm
    for alpha in ALPHAS if norm else ():
        yield f"gamma_flat_{alpha}", text.gamma(norm, flat(alpha))


def _other_norms(text: BlockOnText) -> Iterator[tuple[str, list[Edit]]]:
    block = text.block
    for alpha in ALPHAS if block.ffn_post_norm else ():
        yield f"post_gamma_flat_{alpha}", text.gamma(block.ffn_post_norm, flat(alpha))
    if block.attn_norm is not None:
        yield "attn_gamma_flat_1.0", text.gamma(block.attn_norm)
    if block.attn_post_norm is not None:
        yield "attn_post_gamma_flat_1.0", text.gamma(block.attn_post_norm)


def _neurons(text: BlockOnText) -> Iterator[tuple[str, list[Edit]]]:
    if text.neurons is not None:
        for n in REMOVED:
            yield f"no_top_{n}", text.without(n)
        if text.block.ffn_norm is not None:
            yield "gamma_flat+no_top_2", [*text.gamma(text.block.ffn_norm), *text.without(2)]
    ordinary = text.ordinary()
    if ordinary is not None:
        yield "ordinary_neurons", ordinary


def _branches(text: BlockOnText) -> Iterator[tuple[str, list[Edit]]]:
    block = text.block
    if block.ffn is not None:
        yield "no_ffn", [zeroed(block.sites["ffn_out"])]
    post = block.attn_post_norm
    yield "no_attention", [zeroed(Point(post.module if post else block.mixer, "output"))]
