"""A training run at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from melayer.presentation.tables import number, print_answer, print_text, table
from melayer.tuning import cut_off
from melayer.tuning.report import CURVES, some, training_steps

if TYPE_CHECKING:
    from melayer.tuning.result import TuneResult

_COLUMNS = {
    "loss": "loss",
    "reward": "reward",
    "rewards/correctness/mean": "right",
    cut_off.KEY: "cut off",
    "kl": "KL",
    "rewards/margins": "margin",
    "rewards/accuracies": "in order",
    "mean_token_accuracy": "tokens",
    "grad_norm": "gradient",
}


def show_tune(result: TuneResult, history: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints a run: the answer, what was chosen, and some steps."""
    print_answer(console, result.sentence, result.notes)
    steps = training_steps(history)
    keys = [key for key in _COLUMNS if key in CURVES and any(line.get(key) is not None for line in steps)]
    rows = [[line["step"], *(number(line.get(key), 4) for key in keys)] for line in some(steps)]
    columns = [("step", True), *((_COLUMNS[key], True) for key in keys)]
    console.print(table(f"{result.method}, {result.steps} steps", columns, rows))
    for line in result.validation[:1] + result.validation[1:][-1:]:
        figures = ", ".join(
            f"{name} {line[f'eval_{key}']:.4g}" for key, name in _COLUMNS.items() if line.get(f"eval_{key}") is not None
        )
        print_text(console, f"Validation at step {line['step']}: {figures}")
