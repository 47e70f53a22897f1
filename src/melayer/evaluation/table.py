"""An evaluation at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from melayer.presentation.tables import ABSENT, print_answer, print_text, table

if TYPE_CHECKING:
    from melayer.evaluation.result import EvalResult


def show_eval(result: EvalResult, console: Console) -> None:
    """Prints an evaluation: the answer, every score, and what each comparison allows to conclude."""
    print_answer(console, result.sentence, result.notes)
    console.print(_scores(result))
    if result.changes:
        console.print(_changes(result))
    if result.chosen:
        print_text(console, "\nChosen", style="bold")
        for one in result.chosen:
            where = " (same items!)" if one.same_items else ""
            text = f"{one.task} {one.metric}: {one.variant}, of {one.selected_on} items{where}; {one.change.sentence}"
            print_text(console, text)
    elif result.changes:
        print_text(console, "\nWhat follows", style="bold")
        for change in result.changes:
            if change.primary:
                print_text(console, f"{change.variant} on {result.place(change)}: {change.sentence}")
    print_text(
        console,
        "Intervals are at 95 %: of a share of right answers Wilson's, of the difference of two Tango's score interval, "
        "else Student's t by item. * marks what a benchmark is judged by; these comparisons are corrected together "
        f"(Holm). p: mid-p McNemar test of right and wrong, else sign flips by item. {_how(result)}",
        style="dim",
    )


def _scores(result: EvalResult) -> Table:
    columns = [("task", False), ("metric", False), ("variant", False), ("value", True), ("interval", True), ("n", True)]
    cut = any(score.cut is not None for score in result.scores)
    if cut:
        columns.append(("cut off", True))
    rows = [
        [
            score.task,
            score.metric + ("*" if score.primary else ""),
            score.variant,
            score.shown,
            ABSENT if score.interval is None else score.interval.replace(" to ", "-"),
            score.n,
            *([score.cut or ABSENT] if cut else []),
        ]
        for score in result.scores
    ]
    return table("Scores", columns, rows)


def _changes(result: EvalResult) -> Table:
    columns = [("task", False), ("metric", False), ("variant", False), ("change", True), ("interval", True)]
    columns += [("wins", True), ("losses", True), ("p", True)]
    rows = [
        [
            change.task,
            change.metric + ("*" if change.primary else ""),
            change.variant,
            f"{100 * found.difference:+.1f}",
            ABSENT if found.low is None or found.high is None else f"{100 * found.low:+.1f}..{100 * found.high:+.1f}",
            found.wins,
            found.losses,
            f"{found.adjusted:.3g}",
        ]
        for change, found in ((change, change.comparison) for change in result.changes)
    ]
    return table(f"Against {result.changes[0].base}, in points", columns, rows)


def _how(result: EvalResult) -> str:
    shared = result.settings["shared"]
    if "runs" in shared:
        return f"Stored runs: {', '.join(shared['runs'])}."
    model = shared["model"]
    template = "with the chat template" if shared["chat"] else "without a chat template"
    return f"{model['name']}, {model['dtype']}, fingerprint {model['fingerprint']}, {template}."
