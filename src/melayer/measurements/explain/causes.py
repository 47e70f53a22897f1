"""What creates the value of a block on one text: attention, or which part of the FFN branch keeps it alone."""

from __future__ import annotations

from dataclasses import dataclass

from melayer.measurements.criterion import STAGE_SHARE
from melayer.measurements.explain.block_on_text import BlockOnText
from melayer.measurements.explain.figures import Attribution, Causes
from melayer.model.isolated_block import Edit
from melayer.numerics.finite import ratio

MAJORITY = 0.5
"""A cause is named when it alone keeps at least this share of the write, or of what the block adds."""


@dataclass(frozen=True)
class _Alone:
    """The shares of the FFN's write that each part of its branch creates alone; None where that is not known.

    Where all are known they add up to 1.
    """

    ffn: float | None = None
    gamma: float | None = None
    post_gamma: float | None = None
    jointly: float | None = None
    """The rest, which needs more than one of them."""


def causes_of(text: BlockOnText) -> Causes:
    """What creates the followed scalar, from figures alone."""
    before, after = text.at("block_in"), text.at("block_out")
    added = after - before
    write = text.at("ffn_out") if text.block.ffn else None
    attn_share, ffn_share = ratio(text.at("attn_out"), added), None if write is None else ratio(write, added)
    passed_on = abs(added) < STAGE_SHARE * max(abs(before), abs(after))
    alone = _Alone()
    if not passed_on and write is not None and ffn_share is not None and abs(ffn_share) >= STAGE_SHARE:
        alone = _alone(text, write)
    attribution: Attribution
    if passed_on:
        attribution = "passed on"
    elif attn_share is not None and attn_share >= max(MAJORITY, ffn_share or 0.0):
        attribution = "attention"
    else:
        attribution = _within_ffn(alone)
    return Causes(attribution, attn_share, ffn_share, alone.ffn, alone.gamma, alone.post_gamma, alone.jointly)


def _within_ffn(alone: _Alone) -> Attribution:
    """The part that alone keeps most of the FFN's write, where that is at least half of it."""
    shares: dict[Attribution, float | None] = {
        "ffn": alone.ffn,
        "gamma": alone.gamma,
        "post_gamma": alone.post_gamma,
        "joint": alone.jointly,
    }
    known = {cause: share for cause, share in shares.items() if share is not None}
    if not known:
        return "unknown"
    most = max(known, key=lambda cause: known[cause])
    if known[most] >= MAJORITY:
        return most
    # Where no cause alone keeps half of it, more than one is needed.
    return "joint" if len(known) > 1 else "unknown"


def _alone(text: BlockOnText, write: float) -> _Alone:
    """The shares of `write`, the FFN's, that FFN, pre-norm gamma and post-norm gamma create alone, and the rest."""
    pre, post, ordinary = text.block.ffn_norm, text.block.ffn_post_norm, text.ordinary()

    def kept(*edits: list[Edit]) -> float:
        return text.value([edit for group in edits for edit in group], "ffn_out") / write

    ffn = kept(text.gamma(pre), text.gamma(post))
    if ordinary is None:
        return _Alone(ffn)
    none = kept(text.gamma(pre), ordinary, text.gamma(post))
    gamma = kept(ordinary, text.gamma(post)) - none if pre else None
    post_gamma = kept(text.gamma(pre), ordinary) - none if post else None
    return _Alone(ffn, gamma, post_gamma, 1.0 - ffn - (gamma or 0.0) - (post_gamma or 0.0))
