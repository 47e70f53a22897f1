"""Why a block has its value, in words. The limits at which a wording changes stand here and in docs/explain.md."""

from __future__ import annotations

from collections.abc import Iterator

from melayer.data.rows import visible
from melayer.measurements.criterion import STAGE_SHARE, WHOLE_SHARE
from melayer.measurements.explain.figures import LayerFigures
from melayer.presentation.numbers import number, share

HALF = 0.5
"""From here on a part creates most of it."""
MORE = 1.0 + STAGE_SHARE
"""From here on a share is more than the whole, and below -STAGE_SHARE it is against it; both are explained."""


def sentence(layer: LayerFigures) -> str:
    """Why the block has its value, computed from the figures."""
    came = f"{number(layer.value_in)} to {number(layer.value)}"
    clauses = [
        f"Block {layer.layer}: {_who(layer)} (token {layer.token_index} “{visible(layer.token)}”, dimension "
        f"{layer.d_star}, {came})",
        *([] if layer.passes_on else [*_branches(layer), *_remaining(layer), *_parts(layer)]),
    ]
    return f"{'; '.join(clauses)}."


def _who(layer: LayerFigures) -> str:
    """The cause that `attribution` names, with how much of what the block adds it creates."""
    causes = layer.causes
    one, many = ("lowers", "lower") if layer.erases else ("creates", "create")
    if layer.passes_on:
        return "it stands there already and the block passes it on"
    if causes.attribution == "unknown":
        return f"what {one} it could not be told"
    if causes.attribution == "attention":
        return f"attention {one} {_how_much(causes.attn_share)}"
    of_block = 1.0 if causes.ffn_share is None else causes.ffn_share
    if causes.attribution == "joint":
        if causes.jointly is None or causes.jointly < HALF:
            return f"no part of the FFN branch alone {one} half of it"
        return f"norm and FFN {many} {_how_much(causes.jointly * of_block)} jointly"
    who, alone = {
        "ffn": ("the FFN", causes.ffn_alone),
        "gamma": (f"{layer.norm}'s gamma", causes.gamma_alone),
        "post_gamma": ("the gamma of the norm after the FFN", causes.post_gamma_alone),
    }[causes.attribution]
    assert alone is not None
    if causes.attribution == "ffn" and alone >= MORE:
        return f"the FFN {one} it against the gamma around it, which holds it down"
    return f"{who} alone {one} {_how_much(alone * of_block)}"


def _how_much(part: float | None) -> str:
    """`part` is the share of what the block adds."""
    if part is None or WHOLE_SHARE <= part < MORE:
        return "it"
    if part >= MORE:
        return "more than all of it"
    return "most of it" if part >= HALF else f"the largest part of it ({share(part)})"


def _branches(layer: LayerFigures) -> Iterator[str]:
    """What the branches write, where it is not one of them that writes it all."""
    attn, ffn = layer.causes.attn_share, layer.causes.ffn_share
    one = ffn if layer.causes.attribution != "attention" else attn
    if attn is None or ffn is None or one is None or WHOLE_SHARE <= one < MORE:
        return
    against = ", against each other" if min(attn, ffn) <= -STAGE_SHARE else ""
    yield f"of what the block {_does(layer)} the FFN writes {share(ffn)} and attention {share(attn)}{against}"


def _remaining(layer: LayerFigures) -> Iterator[str]:
    """What is left of what the block adds, without a part."""
    without = [
        (f"{layer.norm}'s gamma (flat)", "gamma_flat_1.0"),
        ("the post-norm's gamma (flat)", "post_gamma_flat_1.0"),
        ("the top two neurons", "no_top_2"),
        *([("attention", "no_attention")] if layer.causes.attribution == "attention" else []),
    ]
    known = [(what, left) for what, name in without if (left := layer.remaining(name)) is not None]
    if known:
        remains = ", ".join(f"without {what} {share(value)}{_odd_remainder(value)}" for what, value in known)
        yield f"of what the block {_does(layer)}, {remains} remains"


def _odd_remainder(value: float) -> str:
    if value >= MORE:
        return " (so it holds the rest down)"
    return " (the opposite)" if value <= -STAGE_SHARE else ""


def _parts(layer: LayerFigures) -> Iterator[str]:
    """What the parts of the FFN's branch create of its write, each alone, and together."""
    causes = layer.causes
    alone = [
        ("FFN alone", causes.ffn_alone, "flat gammas leave more than there is: they hold it down"),
        (f"{layer.norm}'s gamma alone", causes.gamma_alone, "the FFN's weights hold it down"),
        ("post-norm's gamma alone", causes.post_gamma_alone, "the others hold it down"),
        ("jointly", causes.jointly, "more than all, since alone they write less than nothing"),
    ]
    parts = []
    for what, value, if_more in alone:
        if value is None:
            continue
        less = "negative, since the parts alone make more than there is" if what == "jointly" else "against it"
        why = f" ({if_more})" if value >= MORE else f" ({less})" if value <= -STAGE_SHARE else ""
        parts.append(f"{what} {share(value)}{why}")
    if parts:
        yield f"of the FFN's write: {', '.join(parts)}"


def _does(layer: LayerFigures) -> str:
    return "takes away" if layer.erases else "adds"
