"""Where a branch gains the norm: log10 of the norms' ratios from step to step, which add up to the whole exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from melayer.measurements.explain.block_on_text import BlockOnText
from melayer.measurements.explain.figures import BudgetStep
from melayer.model.decoder import Norm


def ffn_budget(text: BlockOnText) -> tuple[BudgetStep, ...]:
    """The steps of the FFN branch and their total; empty where there is no FFN or a norm is 0."""
    block = text.block
    if block.ffn is None:
        return ()
    start = "block_in" if block.parallel else "mid"
    sites = [(start, "")]
    if block.ffn_norm is not None:
        sites.append(("ffn_in", "norm"))
    if "ffn_act" in text.activations:
        sites += [("ffn_act", "gate and up" if block.ffn.gate else "up"), ("ffn_raw", "down")]
    else:
        sites.append(("ffn_raw", "experts" if block.ffn.kind == "experts" else "FFN"))
    return _budget(text, [*sites, *_after("ffn", block.ffn_post_norm, block.sites["ffn_out"].scale)])


def attn_budget(text: BlockOnText) -> tuple[BudgetStep, ...]:
    """The same of the attention branch; empty without softmax attention."""
    block = text.block
    if block.attention is None:
        return ()
    sites = [("block_in", "")]
    if block.attn_norm is not None:
        sites.append(("attn_in", "norm"))
    sites.append(("attn_raw", "attention"))
    return _budget(text, [*sites, *_after("attn", block.attn_post_norm, block.sites["attn_out"].scale)])


def _after(branch: str, post: Norm | None, scale: float) -> list[tuple[str, str]]:
    """The steps between what a branch's module returns and what is added to the residual stream."""
    steps = [(f"{branch}_post", "post-norm")] if post is not None else []
    return steps + ([(f"{branch}_out", "multiplier")] if scale != 1.0 else [])


def _budget(text: BlockOnText, sites: Sequence[tuple[str, str]]) -> tuple[BudgetStep, ...]:
    """The steps from site to site, each named with the site that it leads to, and their total."""
    massive, others = [], []
    for site, _ in sites:
        norms = torch.linalg.vector_norm(text.activations[site].double(), dim=-1)
        rest = torch.cat([norms[: text.token], norms[text.token + 1 :]])
        massive.append(_log(float(norms[text.token])))
        others.append(_log(float(rest.median())) if len(rest) else None)
    if None in massive:
        return ()

    def step(name: str, before: int, after: int) -> BudgetStep:
        gain = _difference(massive[before], massive[after])
        assert gain is not None
        other = _difference(others[before], others[after])
        return BudgetStep(name, gain, other, None if other is None else gain - other)

    steps = [step(name, place, place + 1) for place, (_, name) in enumerate(sites[1:])]
    return (*steps, step("total", 0, len(sites) - 1))


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _log(value: float) -> float | None:
    return math.log10(value) if value > 0 and math.isfinite(value) else None
