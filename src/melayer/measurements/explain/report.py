"""The report's section on why the massive activation is there."""

from __future__ import annotations

from collections.abc import Sequence

from melayer.data.rows import visible
from melayer.measurements.explain.figures import Counterfactual
from melayer.measurements.explain.result import ExplainResult, LayerExplanation
from melayer.numerics.finite import ratio
from melayer.presentation import figures
from melayer.presentation.figures import BLUE, GREY, ORANGE, axis, hover, stroke
from melayer.presentation.numbers import number, rounded, share
from melayer.presentation.sections import Plot, Section, Table

TITLE = "Why it is there"

_ENDS = (
    "0% that the value stays what it was at the block's input; beyond 100% the part holds it down, below 0% the block "
    "does the opposite without it. "
)


def section(result: ExplainResult) -> Section:
    """For each block explained, plots of its budget, neurons and counterfactuals, and its tables; else nothing."""
    parts: list[Plot | Table] = []
    for layer in result.layers:
        if layer.budget:
            parts.append(_budget(layer))
        if layer.neurons:
            parts.append(_neurons(layer))
        shown = [row for row in layer.counterfactuals if _left(layer, row.value) is not None]
        if shown:
            parts.append(_counterfactuals(layer, shown))
        parts.append(_causes(layer))
        if layer.drivers:
            parts += [_drivers(layer), _directions(layer)]
        if layer.experts:
            parts.append(_experts(layer))
        parts.append(_steps(layer))
    return Section("explain", TITLE, result.sentence, parts)


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
    template = hover("%{x}: %{text}<br>%{customdata}")
    bars = figures.waterfall([step.step for step in layer.budget], rounded(values, 5), template=template)
    bars["text"] = [f"{value:+.2f}" for value in values]
    bars["customdata"] = [
        f"massive {step.massive:+.3f}" + ("" if step.others is None else f"<br>others {step.others:+.3f}")
        for step in layer.budget
    ]
    return Plot(
        f"explain-budget-{layer.layer}",
        f"Block {layer.layer}: where the norm is gained on the way through the FFN",
        takeaway,
        "Each bar is log10 of the norm after a step over the norm before it, for the massive token less the same of "
        "the median norm of the other tokens: +1 is ten times more. The bars add up to the total exactly.",
        figures.figure(
            [bars],
            axis("step"),
            axis(f"{'excess' if compared else 'gain'} (powers of ten)"),
            {"showlegend": False},
        ),
    )


def _neurons(layer: LayerExplanation) -> Plot:
    heaviest = layer.neurons[0]
    two = sum(neuron.share for neuron in layer.neurons[:2])
    others = f", the top two {share(two)}" if len(layer.neurons) > 1 else ""
    names = [f"{n.neuron}" if n.expert is None else f"{n.expert}/{n.neuron}" for n in layer.neurons]
    where = "" if heaviest.expert is None else f" of expert {heaviest.expert}"
    read = " Written as expert/neuron." if layer.experts else ""
    template = hover("neuron %{x}: %{y:.2f}%<br>writes %{customdata:,.1f}")
    bars = figures.bar(names, rounded([100 * n.share for n in layer.neurons], 5), BLUE, template=template)
    bars["customdata"] = rounded([n.contribution for n in layer.neurons], 6)
    return Plot(
        f"explain-neurons-{layer.layer}",
        f"Block {layer.layer}: the neurons that write dimension {layer.d_star}",
        f"Neuron {heaviest.neuron}{where} writes {share(heaviest.share)} of what the FFN returns there{others}; all "
        f"that are not shown write {share(layer.rest_share or 0)}.",
        f"Share of the FFN's output in dimension {layer.d_star} (before a post-norm), for the {len(names)} heaviest "
        f"neurons; the sum over all neurons and the bias is exactly 100%.{read}",
        figures.figure(
            [bars],
            axis("neuron (0-based)", type="category", automargin=True),
            axis("share (%)"),
            {"showlegend": False},
        ),
    )


def _left(layer: LayerExplanation, value: float) -> float | None:
    """What is left where the value is another one: of what the block adds; where it passes it on, of the value."""
    return ratio(value, layer.value) if layer.passes_on else layer.remaining_of(value)


def _counterfactuals(layer: LayerExplanation, rows: Sequence[Counterfactual]) -> Plot:
    left = {row.name: _left(layer, row.value) or 0.0 for row in rows}
    least, gamma = min(rows, key=lambda row: abs(left[row.name])), left.get("gamma_flat_1.0")
    does = "the value" if layer.passes_on else f"what the block {'takes away' if layer.erases else 'adds'}"
    flat = "" if gamma is None else f"; with a flat gamma before the FFN {share(gamma)} is left"
    bars = figures.bar(
        rounded([100 * left[row.name] for row in rows], 5),
        [row.name for row in rows],
        BLUE,
        template=hover("%{y}: %{x:.2f}%<br>value %{customdata:,.1f}"),
    )
    bars["orientation"] = "h"
    bars["customdata"] = rounded([row.value for row in rows], 6)
    spreads = [_spread(layer, row) for row in rows]
    up, down = (rounded([spread[side] for spread in spreads], 4) for side in (0, 1))
    bars["error_x"] = figures.whiskers(up, down, color=GREY, thickness=1)
    ends = "" if layer.passes_on else _ENDS
    return Plot(
        f"explain-counterfactuals-{layer.layer}",
        f"Block {layer.layer}: what is left of {does} without a part",
        f"The block makes {number(layer.value_in, 1)} into {number(layer.value, 1)}. Of {does} least is left in "
        f"{least.name} ({share(left[least.name])}, value {number(least.value, 1)}){flat}.",
        f"The block runs again on the same input with one thing changed. 100% is {does} as it is. {ends}gamma_flat_A: "
        "gamma moved towards its mean by the share A; gamma_permuted: its entries in another order (mean, with the "
        "smallest and largest over the seeds); no_top_N: the N heaviest neurons removed; ordinary_neurons: no "
        "neuron's weights larger than the median.",
        figures.figure(
            [bars],
            axis(f"left of {does} (%)"),
            axis(autorange="reversed", automargin=True, type="category"),
            {"shapes": [figures.vertical(100, stroke(ORANGE))], "showlegend": False},
            figures.height(len(rows), 22, beside=110, least=280),
        ),
    )


def _spread(layer: LayerExplanation, row: Counterfactual) -> tuple[float, float]:
    """How far the seeds reach above and below what is left in their mean, in percent."""
    values = [row.value if end is None else end for end in (row.lowest, row.highest)]
    ends = [100 * (_left(layer, value) or 0.0) for value in values]
    mean = 100 * (_left(layer, row.value) or 0.0)
    return max(ends) - mean, mean - min(ends)  # of a negative value the lowest is what leaves most


def _causes(layer: LayerExplanation) -> Table:
    attributions = sorted({text.causes.attribution for text in layer.texts})
    same = len(attributions) == 1
    takeaway = f"The same in all: {attributions[0]}." if same else f"The texts differ: {', '.join(attributions)}."
    rows = []
    for text in layer.texts:
        causes = text.causes
        alone = (causes.ffn_alone, causes.gamma_alone, causes.post_gamma_alone, causes.jointly)
        place = f"{text.token_index}: {visible(text.token)}"
        cells = [text.sequence, place, text.dim, number(text.value, 1), causes.attribution]
        rows.append([*cells, *map(share, (causes.attn_share, causes.ffn_share, *alone))])
    columns = ["text", "token", "dimension", "value", "cause", "by attention", "by FFN", "FFN alone"]
    return Table(
        f"Block {layer.layer}: the causes in each text",
        [*columns, "gamma alone", "post-norm's gamma alone", "jointly"],
        rows,
        takeaway=takeaway,
    )


def _drivers(layer: LayerExplanation) -> Table:
    return Table(
        f"Block {layer.layer}: what drives neuron {layer.neurons[0].neuron}",
        ["pre-activation", "input dimension", "adds", "share", "gamma"],
        [
            [row.projection, row.dim, number(row.contribution, 3), share(row.share), number(row.gamma, 3)]
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
        [[row.expert, number(row.weight, 4), share(row.share)] for row in layer.experts],
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
