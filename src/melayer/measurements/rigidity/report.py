"""The report's section on what the massive activation makes rigid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from melayer.measurements.rigidity.result import RigidityResult
from melayer.presentation.sections import BLUE, GREY, ORANGE, VERMILLION, Plot, Section, Table, rounded

_SITES = {"attn_in": ("what attention reads", BLUE), "block_out": ("residual stream", VERMILLION)}


def section(result: RigidityResult) -> Section:
    """Plots of a rigidity result; the one of the effective rank is left out where no text is long enough."""
    parts: list[Plot | Table] = [_cosine(result)]
    if result.effective_rank:
        parts.append(_rank(result))
    return Section("rigidity", "What it makes rigid", result.sentence, parts)


def _cosine(result: RigidityResult) -> Plot:
    token = "token 0" if result.me_layer is None else "the massive token"
    inputs = (
        "over texts with the same first token, which is 1 by causality"
        if result.fixed_first_token
        else f"between the states of {result.n_first_tokens} different first tokens, mean over all pairs"
    )
    data = [
        _line("to the next block", range(len(result.cosine_next)), result.cosine_next, BLUE),
        _line("to the peak state", range(len(result.cosine_peak)), result.cosine_peak, GREY, dash="dot"),
        _line("over first tokens", range(len(result.cosine_inputs)), result.cosine_inputs, VERMILLION),
    ]
    if any(value is not None for value in result.cosine_inputs_massive) and (
        result.n_massive_first_tokens != result.n_first_tokens
    ):
        name = f"over the {result.n_massive_first_tokens} massive ones"
        data.append(_line(name, range(result.model.n_layers), result.cosine_inputs_massive, VERMILLION, dash="dash"))
    return Plot(
        "rigidity-cosine",
        "Direction of the state by block",
        _cosine_takeaway(result),
        f"Cosines of the state of {token} at each block's output: with its own state one block later and with the one "
        f"where its norm peaks (means over {result.n_sequences} texts), and {inputs}. 1 is the same direction; a "
        "stretch of ones is where nothing about the token changes.",
        {
            "data": data,
            "layout": {
                "xaxis": {"title": {"text": "block (0-based)"}},
                "yaxis": {"title": {"text": "cosine"}},
                **_marked(result),
            },
        },
    )


def _cosine_takeaway(result: RigidityResult) -> str:
    known = [(value, layer) for layer, value in enumerate(result.cosine_next) if value is not None]
    if not known:
        return "No two neighbouring blocks could be compared."
    lowest, at = min(known)
    text = f"The state turns most between blocks {at} and {at + 1} (cosine {lowest:.3f})"
    me_layer, last = result.me_layer, result.rigid_until
    if me_layer is not None and last is not None:
        after = [value for value in result.cosine_next[me_layer:last] if value is not None]
        if after:
            text += f" and least from block {me_layer} to block {last} (mean cosine {np.mean(after):.4f})"
    inputs = result.cosine_inputs[me_layer] if me_layer is not None else None
    if inputs is not None and not result.fixed_first_token:
        text += f"; over first tokens it is {inputs:.3f} at the ME layer"
    return f"{text}."


def _rank(result: RigidityResult) -> Plot:
    data = []
    for site, (name, colour) in _SITES.items():
        rows = [row for row in result.effective_rank if row.site == site]
        layers = [row.layer for row in rows]
        if rows:
            data.append(_line(name, layers, [row.with_massive for row in rows], colour))
        if any(row.without_massive is not None for row in rows):
            without = [row.without_massive for row in rows]
            data.append(_line(f"{name}, without massive tokens", layers, without, colour, dash="dash"))
    return Plot(
        "rigidity-rank",
        "Effective rank of the tokens",
        _rank_takeaway(result),
        "How many directions the tokens of a text span, exp of the entropy of the squared singular values of [tokens, "
        f"d_model], mean over {result.n_rank_sequences} texts of {result.tokens:,.0f} tokens (median); it cannot "
        "exceed the number of tokens. Where the dashed line is above the solid one of its colour, the massive tokens "
        "hide the others.",
        {
            "data": data,
            "layout": {
                "xaxis": {"title": {"text": "block (0-based)"}},
                "yaxis": {"title": {"text": "effective rank"}, "rangemode": "tozero"},
                **_marked(result),
            },
        },
    )


def _rank_takeaway(result: RigidityResult) -> str:
    found = []
    for site, where in (("block_out", "the residual stream"), ("attn_in", "what attention reads")):
        with_massive, without = result.mean_rank(site)  # type: ignore[arg-type]
        if with_massive is not None and without is not None:
            found.append(f"{with_massive:.1f} for {where} with the massive tokens and {without:.1f} without")
    if found:
        return f"After the ME layer the effective rank is {'; '.join(found)}."
    ranks = [row.with_massive for row in result.effective_rank if row.with_massive is not None]
    if not ranks:
        return "No effective rank could be computed."
    return f"Over blocks and sites the effective rank goes from {min(ranks):.1f} to {max(ranks):.1f}."


def _marked(result: RigidityResult) -> dict[str, Any]:
    """The line at the ME layer, as in the section on where it is."""
    at = result.me_layer
    if at is None:
        return {"shapes": [], "annotations": []}
    line = {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1}
    text = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": f"ME layer {at}", "showarrow": False}
    return {
        "shapes": [line | {"line": {"color": ORANGE, "width": 2}}],
        "annotations": [text | {"font": {"color": ORANGE}}],
    }


def _line(
    name: str, x: Sequence[int], y: Sequence[float | None], colour: str, *, dash: str = "solid"
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": rounded(np.array([math.nan if value is None else value for value in y]), 6),
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"size": 5 if dash == "solid" else 1},
        "hovertemplate": "block %{x}: %{y:.4f}<extra>" + name + "</extra>",
    }
