"""A training run at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from melayer.presentation.tables import number, table
from melayer.tuning.report import CURVES, shown

if TYPE_CHECKING:
    from melayer.tuning.result import TuneResult

_COLUMNS = {
    "loss": "loss",
    "reward": "reward",
    "rewards/correctness/mean": "right",
    "kl": "KL",
    "rewards/margins": "margin",
    "rewards/accuracies": "in order",
    "mean_token_accuracy": "tokens",
    "grad_norm": "gradient",
}


def show_tune(result: TuneResult, history: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints a run: the answer, what was chosen, and some steps."""
    console.print(f"[bold]{escape(result.sentence)}[/]", highlight=False)
    for note in result.notes:
        console.print(escape(note), style="dim", highlight=False)
    trained = [line for line in history if not any(key.startswith("eval_") for key in line)]
    keys = [key for key in _COLUMNS if key in CURVES and any(line.get(key) is not None for line in trained)]
    rows = [[str(line["step"]), *(number(line.get(key), 4) for key in keys)] for line in shown(trained)]
    columns = [("step", True), *((_COLUMNS[key], True) for key in keys)]
    console.print(table(f"{result.method}, {result.steps} steps", columns, rows))
    for line in result.validation[:1] + result.validation[1:][-1:]:
        figures = ", ".join(
            f"{name} {line[f'eval_{key}']:.4g}" for key, name in _COLUMNS.items() if line.get(f"eval_{key}") is not None
        )
        console.print(f"Validation at step {line['step']}: {figures}", highlight=False)
