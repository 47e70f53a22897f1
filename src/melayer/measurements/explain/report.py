"""The report's section on why the massive activation is there."""

from __future__ import annotations

import numpy as np

from melayer.data.rows import visible
from melayer.measurements.explain.result import ExplainResult, LayerExplanation
from melayer.presentation.sections import BLUE, GREY, ORANGE, VERMILLION, Plot, Section, Table, number, rounded


def section(result: ExplainResult) -> Section:
    """For each block explained, plots of its budget, neurons and counterfactuals, and its tables; else nothing."""
    parts: list[Plot | Table] = []
    for layer in result.layers:
        if layer.budget:
            parts.append(_budget(layer))
        if layer.neurons:
            parts.append(_neurons(layer))
        parts += [_counterfactuals(layer), _causes(layer)]
        if layer.drivers:
            parts += [_drivers(layer), _directions(layer)]
        if layer.experts:
            parts.append(_experts(layer))
        parts.append(_steps(layer))
    return Section("explain", "Why it is there", result.sentence, parts)


def _budget(layer: LayerExplanation) -> Plot:
    steps = layer.budget[:-1]
    excess = [step.excess for step in layer.budget]
    known = [value for value in excess if value is not None]
    compared = len(known) == len(excess)
    values = known if compared else [step.massive for step in layer.budget]
    most = max(range(len(steps)), key=lambda place: values[place])
    subject = "more than the others" if compared else "(the others have no norms to compare it with)"
    takeaway = (
        f"From the residual stream to the FFN's write the massive token's norm gains {values[-1]:+.2f} powers of ten "
        f"{subject}; the step “{steps[most].step}” gives {values[most]:+.2f} of them."
    )
    hover = [
        f"massive {step.massive:+.3f}" + ("" if step.others is None else f"<br>others {step.others:+.3f}")
        for step in layer.budget
    ]
    return Plot(
        f"explain-budget-{layer.layer}",
        f"Block {layer.layer}: where the norm is gained on the way through the FFN",
        takeaway,
        "Each bar is log10 of the norm after a step over the norm before it, for the massive token less the same of "
        "the median norm of the other tokens: +1 is ten times more. The bars add up to the total exactly.",
        {
            "data": [
                {
                    "type": "waterfall",
                    "x": [step.step for step in layer.budget],
                    "y": rounded(np.array(values), 5),
                    "measure": [*["relative"] * len(steps), "total"],
                    "text": [f"{value:+.2f}" for value in values],
                    "customdata": hover,
                    "hovertemplate": "%{x}: %{text}<br>%{customdata}<extra></extra>",
                    "increasing": {"marker": {"color": VERMILLION}},
                    "decreasing": {"marker": {"color": BLUE}},
                    "totals": {"marker": {"color": GREY}},
                    "connector": {"line": {"color": GREY, "width": 1}},
                }
            ],
            "layout": {
                "xaxis": {"title": {"text": "step"}},
                "yaxis": {"title": {"text": f"{'excess' if compared else 'gain'} (powers of ten)"}},
                "showlegend": False,
            },
        },
    )


def _neurons(layer: LayerExplanation) -> Plot:
    heaviest = layer.neurons[0]
    two = sum(neuron.share for neuron in layer.neurons[:2])
    others = f", the top two {two:.1%}" if len(layer.neurons) > 1 else ""
    names = [f"{n.neuron}" if n.expert is None else f"{n.expert}/{n.neuron}" for n in layer.neurons]
    where = "" if heaviest.expert is None else f" of expert {heaviest.expert}"
    read = " Written as expert/neuron." if layer.experts else ""
    return Plot(
        f"explain-neurons-{layer.layer}",
        f"Block {layer.layer}: the neurons that write dimension {layer.d_star}",
        f"Neuron {heaviest.neuron}{where} writes {heaviest.share:.1%} of what the FFN returns there{others}; all that "
        f"are not shown write {layer.rest_share or 0:.1%}.",
        f"Share of the FFN's output in dimension {layer.d_star} (before a post-norm), for the {len(names)} heaviest "
        f"neurons; the sum over all neurons and the bias is exactly 100%.{read}",
        {
            "data": [
                {
                    "type": "bar",
                    "x": names,
                    "y": rounded(np.array([100 * n.share for n in layer.neurons]), 5),
                    "customdata": rounded(np.array([n.contribution for n in layer.neurons]), 6),
                    "marker": {"color": BLUE},
                    "hovertemplate": "neuron %{x}: %{y:.2f}%<br>writes %{customdata:,.1f}<extra></extra>",
                }
            ],
            "layout": {
                "xaxis": {"title": {"text": "neuron (0-based)"}, "type": "category", "automargin": True},
                "yaxis": {"title": {"text": "share (%)"}},
                "showlegend": False,
            },
        },
    )


def _counterfactuals(layer: LayerExplanation) -> Plot:
    rows = [row for row in layer.counterfactuals if row.relative is not None]
    low = min(rows, key=lambda row: abs(row.relative or 0.0))
    gamma = layer.relative("gamma_flat_1.0")
    flat = "" if gamma is None else f"; with a flat gamma before the FFN {gamma:.1%} is left"
    spread = [
        (
            abs((row.highest if row.highest is not None else row.value) - row.value) / abs(layer.value) * 100,
            abs(row.value - (row.lowest if row.lowest is not None else row.value)) / abs(layer.value) * 100,
        )
        for row in rows
    ]
    return Plot(
        f"explain-counterfactuals-{layer.layer}",
        f"Block {layer.layer}: what is left of the value without a part",
        f"Least is left in {low.name}: {low.value:,.1f} of {layer.value:,.1f} ({low.relative or 0:.1%}){flat}.",
        "The block runs again on the same input with one thing changed; 100% is the value as it is. gamma_flat_A: "
        "gamma moved towards its mean by the share A; gamma_permuted: its entries in another order (mean, with the "
        "smallest and largest over the seeds); no_top_N: the N heaviest neurons removed; ordinary_neurons: no "
        "neuron's weights larger than the median.",
        {
            "data": [
                {
                    "type": "bar",
                    "orientation": "h",
                    "y": [row.name for row in rows],
                    "x": rounded(np.array([100 * (row.relative or 0.0) for row in rows]), 5),
                    "error_x": {
                        "type": "data",
                        "symmetric": False,
                        "array": rounded(np.array([up for up, _ in spread]), 4),
                        "arrayminus": rounded(np.array([down for _, down in spread]), 4),
                        "color": GREY,
                        "thickness": 1,
                    },
                    "customdata": rounded(np.array([row.value for row in rows]), 6),
                    "marker": {"color": BLUE},
                    "hovertemplate": "%{y}: %{x:.2f}%<br>value %{customdata:,.1f}<extra></extra>",
                }
            ],
            "layout": {
                "xaxis": {"title": {"text": "left of the value (%)"}},
                "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
                "shapes": [
                    {
                        "type": "line",
                        "x0": 100,
                        "x1": 100,
                        "yref": "paper",
                        "y0": 0,
                        "y1": 1,
                        "line": {"color": ORANGE, "width": 2},
                    }
                ],
                "showlegend": False,
                "height": max(280, 110 + 22 * len(rows)),
            },
        },
    )


def _causes(layer: LayerExplanation) -> Table:
    found = sorted({text.causes.attribution for text in layer.texts})
    same = f"The same in all: {found[0]}." if len(found) == 1 else f"The texts differ: {', '.join(found)}."
    rows = []
    for text in layer.texts:
        causes = text.causes
        alone = (causes.ffn_alone, causes.gamma_alone, causes.post_gamma_alone, causes.jointly)
        place = f"{text.token_index}: {visible(text.token)}"
        cells = [text.sequence, place, text.dim, number(text.value, 1), causes.attribution]
        rows.append([*cells, *map(_share, (causes.attn_share, causes.ffn_share, *alone))])
    columns = ["text", "token", "dimension", "value", "cause", "by attention", "by FFN", "FFN alone"]
    return Table(
        f"Block {layer.layer}: the causes in each text",
        [*columns, "gamma alone", "post-norm's gamma alone", "jointly"],
        rows,
        takeaway=same,
    )


def _drivers(layer: LayerExplanation) -> Table:
    return Table(
        f"Block {layer.layer}: what drives neuron {layer.neurons[0].neuron}",
        ["pre-activation", "input dimension", "adds", "share", "gamma"],
        [
            [row.projection, row.dim, number(row.contribution, 3), _share(row.share), number(row.gamma, 3)]
            for row in layer.drivers
        ],
        folded=True,
    )


def _directions(layer: LayerExplanation) -> Table:
    return Table(
        f"Block {layer.layer}: the write against the down projection's singular vectors",
        ["rank", "singular value", "|cosine|"],
        [[row.rank, number(row.singular_value, 3), number(row.cosine, 4)] for row in layer.directions],
        folded=True,
    )


def _experts(layer: LayerExplanation) -> Table:
    return Table(
        f"Block {layer.layer}: the experts that the token visits",
        ["expert", "routing weight", "share of the FFN's output"],
        [[row.expert, number(row.weight, 4), _share(row.share)] for row in layer.experts],
        folded=True,
    )


def _steps(layer: LayerExplanation) -> Table:
    return Table(
        f"Block {layer.layer}: log10 of the norms' ratios, both branches",
        ["branch", "step", "massive", "others", "excess"],
        [
            [branch, row.step, number(row.massive, 4), number(row.others, 4), number(row.excess, 4)]
            for branch, budget in (("FFN", layer.budget), ("attention", layer.attn_budget))
            for row in budget
        ],
        folded=True,
    )


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}".replace("-0.0%", "0.0%")
