"""The report's section on what the massive activation makes rigid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from melayer.measurements.rigidity.result import RigidityResult
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, GREY, VERMILLION, Trace, axis, hover, stroke
from melayer.presentation.numbers import number, rounded
from melayer.presentation.sections import Plot, Section, Table

TITLE = "What it makes rigid"
_SITES = {"attn_in": ("what attention reads", BLUE), "block_out": ("residual stream", VERMILLION)}


def section(result: RigidityResult) -> Section:
    """Plots of a rigidity result; the one of the effective rank is left out where no text is long enough."""
    parts: list[Plot | Table] = [_cosine(result)]
    if result.effective_rank:
        parts.append(_rank(result))
    return Section("rigidity", TITLE, result.sentence, parts)


def _cosine(result: RigidityResult) -> Plot:
    token = "token 0" if result.me_layer is None else "the massive token"
    inputs = (
        "over texts with the same first token, which is 1 by causality"
        if result.fixed_first_token
        else f"between the states of {result.n_first_tokens} different first tokens, mean over all pairs"
    )
    data = [
        _curve("to the next block", range(len(result.cosine_next)), result.cosine_next, BLUE),
        _curve("to the peak state", range(len(result.cosine_peak)), result.cosine_peak, GREY, dash="dot"),
        _curve("over first tokens", range(len(result.cosine_inputs)), result.cosine_inputs, VERMILLION),
    ]
    if any(value is not None for value in result.cosine_inputs_massive) and (
        result.n_massive_first_tokens != result.n_first_tokens
    ):
        name = f"over the {result.n_massive_first_tokens} massive ones"
        data.append(_curve(name, range(result.model.n_layers), result.cosine_inputs_massive, VERMILLION, dash="dash"))
    return Plot(
        "rigidity-cosine",
        "Direction of the state by block",
        _cosine_takeaway(result),
        f"Cosines of the state of {token} at each block's output: with its own state one block later and with the one "
        f"where its norm peaks (means over {result.n_sequences} texts), and {inputs}. 1 is the same direction; a "
        "stretch of ones is where nothing about the token changes.",
        figures.figure(
            data, axis(BLOCK), axis("cosine"), figures.marked(result.me_layer, f"ME layer {result.me_layer}")
        ),
    )


def _cosine_takeaway(result: RigidityResult) -> str:
    known = [(value, layer) for layer, value in enumerate(result.cosine_next) if value is not None]
    if not known:
        return "No two neighbouring blocks could be compared."
    lowest, at = min(known)
    text = f"The state turns most between blocks {at} and {at + 1} (cosine {number(lowest, 3)})"
    me_layer, last = result.me_layer, result.rigid_until
    if me_layer is not None and last is not None:
        after = [value for value in result.cosine_next[me_layer:last] if value is not None]
        if after:
            text += f" and least from block {me_layer} to block {last} (mean cosine {np.mean(after):.4f})"
    inputs = result.cosine_inputs[me_layer] if me_layer is not None else None
    if inputs is not None and not result.fixed_first_token:
        text += f"; over first tokens it is {number(inputs, 3)} at the ME layer"
    return f"{text}."


def _rank(result: RigidityResult) -> Plot:
    data = []
    for site, (name, colour) in _SITES.items():
        rows = [row for row in result.effective_rank if row.site == site]
        layers = [row.layer for row in rows]
        if rows:
            data.append(_curve(name, layers, [row.with_massive for row in rows], colour))
        if any(row.without_massive is not None for row in rows):
            without = [row.without_massive for row in rows]
            data.append(_curve(f"{name}, without massive tokens", layers, without, colour, dash="dash"))
    return Plot(
        "rigidity-rank",
        "Effective rank of the tokens",
        _rank_takeaway(result),
        "How many directions the tokens of a text span, exp of the entropy of the squared singular values of [tokens, "
        f"d_model], mean over {result.n_rank_sequences} texts of {result.tokens:,.0f} tokens (median); it cannot "
        "exceed the number of tokens. Where the dashed line is above the solid one of its colour, the massive tokens "
        "hide the others.",
        figures.figure(
            data,
            axis(BLOCK),
            axis("effective rank", rangemode="tozero"),
            figures.marked(result.me_layer, f"ME layer {result.me_layer}"),
        ),
    )


def _rank_takeaway(result: RigidityResult) -> str:
    means = []
    for site, where in (("block_out", "the residual stream"), ("attn_in", "what attention reads")):
        with_massive, without = result.mean_rank(site)  # type: ignore[arg-type]
        if with_massive is not None and without is not None:
            means.append(f"{with_massive:.1f} for {where} with the massive tokens and {without:.1f} without")
    if means:
        return f"After the ME layer the effective rank is {'; '.join(means)}."
    ranks = [row.with_massive for row in result.effective_rank if row.with_massive is not None]
    if not ranks:
        return "No effective rank could be computed."
    return f"Over blocks and sites the effective rank goes from {min(ranks):.1f} to {max(ranks):.1f}."


def _curve(name: str, x: Sequence[int], y: Sequence[float | None], colour: str, *, dash: str = "solid") -> Trace:
    return figures.line(
        name,
        x,
        rounded(y, 6),
        stroke(colour, dash=dash),
        marker=5 if dash == "solid" else 1,
        template=hover("block %{x}: %{y:.4f}", name),
    )
