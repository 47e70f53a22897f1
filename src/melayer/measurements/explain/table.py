"""An explain result at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.data.rows import visible
from melayer.presentation.tables import number, print_answer, print_text, share, table

if TYPE_CHECKING:
    from melayer.measurements.explain.result import ExplainResult, LayerExplanation


def show_explain(result: ExplainResult, console: Console) -> None:
    """Prints an explain result: the answer, then for each block its budget, neurons and counterfactuals."""
    print_answer(console, result.sentence, result.notes)
    for layer in result.layers:
        for note in layer.notes:
            print_text(console, f"Block {layer.layer}: {note}", style="dim")
        console.print(_budget(layer))
        if layer.neurons:
            console.print(_neurons(layer))
        console.print(_counterfactuals(layer))
        if len(layer.texts) > 1:
            console.print(_texts(layer))
    model = result.model
    print_text(
        console,
        "Budget: log10 of the norm after each step over the norm before it; others: the median of the other tokens. "
        f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}. "
        "Blocks, tokens, dimensions and neurons are 0-based.",
        style="dim",
    )


def _budget(layer: LayerExplanation) -> Table:
    columns = [("branch", False), ("step", False), ("massive", True), ("others", True), ("excess", True)]
    rows = [
        [branch, row.step, *(number(value, 3) for value in (row.massive, row.others, row.excess))]
        for branch, budget in (("FFN", layer.budget), ("attention", layer.attn_budget))
        for row in budget
    ]
    return table(f"Block {layer.layer}: powers of ten gained at each step", columns, rows)


def _neurons(layer: LayerExplanation) -> Table:
    among = [("expert", True)] if layer.experts else []
    columns = [("neuron", True), *among, ("share", True), ("contribution", True)]
    rows = [
        [n.neuron, *([n.expert] if among else []), share(n.share), number(n.contribution, 1)] for n in layer.neurons
    ]
    return table(f"Block {layer.layer}: neurons that write dimension {layer.d_star}", columns, rows)


def _counterfactuals(layer: LayerExplanation) -> Table:
    columns = [("counterfactual", False), ("value", True), ("left", True), ("of the value", True)]
    columns += [("lowest", True), ("highest", True)]
    rows = [
        [
            row.name,
            number(row.value, 1),
            share(layer.remaining_of(row.value)),
            share(row.relative),
            number(row.lowest, 1),
            number(row.highest, 1),
        ]
        for row in layer.counterfactuals
    ]
    came = f"{number(layer.value_in, 1)} to {number(layer.value, 1)}"
    return table(f"Block {layer.layer}: {came}, and what is left of what it adds without a part", columns, rows)


def _texts(layer: LayerExplanation) -> Table:
    columns = [(name, True) for name in ("text", "token", "value", "FFN alone", "gamma", "post-gamma", "jointly")]
    columns = [*columns, ("cause", False), ("", False)]
    rows = []
    for text in layer.texts:
        causes = text.causes
        shares = (causes.ffn_alone, causes.gamma_alone, causes.post_gamma_alone, causes.jointly)
        cells = [text.sequence, text.token_index, number(text.value, 1), *map(share, shares)]
        rows.append([*cells, causes.attribution, visible(text.token)])
    return table(f"Block {layer.layer}: the causes in each text", columns, rows)
