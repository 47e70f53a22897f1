"""The report's section on an evaluation: what can be concluded, the figures, and the answers that flipped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.presentation import figures
from melayer.presentation.figures import BLUE, GREY, ORANGE, axis, hover, label, stroke
from melayer.presentation.numbers import ABSENT
from melayer.presentation.page import Facts, Page, Written, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table

if TYPE_CHECKING:
    from melayer.evaluation.result import Change, EvalResult


FLIPS = 20
"""Items shown for each comparison and direction."""
_LONGEST = 700
"""Characters of an answer shown."""


def section(result: EvalResult) -> Section:
    """The section as the page takes it."""
    parts: list[Plot | Table] = []
    if any(change.primary for change in result.changes):
        parts += [_forest(result), _conclusions(result)]
    parts.append(_scores(result))
    if result.changes:
        parts.append(_differences(result))
    if result.chosen:
        parts.append(_chosen(result))
    judged = [change for change in result.changes if change.primary and change.kind == "mean"]
    parts += [table for change in judged for table in _flips(result, change)]
    return Section("evaluation", "Does it help?", result.sentence, parts)


def _forest(result: EvalResult) -> Plot:
    primary = [change for change in result.changes if change.primary]
    names = [
        f"{label(result.place(change))}, {label(change.variant)}" + ("" if change.comparison.higher_is_better else " ↓")
        for change in primary
    ]
    comparisons = [change.comparison for change in primary]
    marker = {"size": 10, "color": [BLUE if comparison.shown else GREY for comparison in comparisons]}
    differences = figures.points(
        [round(100 * comparison.difference, 3) for comparison in comparisons],
        names,
        marker,
        template=hover("%{y}: %{x:+.1f} (%{text})"),
    )
    ends = [
        (one.difference if one.low is None else one.low, one.difference if one.high is None else one.high)
        for one in comparisons
    ]
    up = [round(100 * (high - one.difference), 3) for (_, high), one in zip(ends, comparisons, strict=True)]
    down = [round(100 * (one.difference - low), 3) for (low, _), one in zip(ends, comparisons, strict=True)]
    differences["error_x"] = figures.whiskers(up, down, thickness=2)
    differences["text"] = [f"wins {one.wins}, losses {one.losses}, p {one.adjusted:.3g}" for one in comparisons]
    base = primary[0].base
    return Plot(
        "forest",
        "Each variant against the first",
        _resolution(primary),
        f"Each point is a variant's score less that of {base} on the same items, in points of accuracy (of "
        "perplexity: hundredths of a nat a word, more is better); the bar is its 95 % interval. Blue: "
        "a difference is shown after Holm's correction. ↓ marks a score of which less is better.",
        figures.figure(
            [differences],
            axis(f"difference from {label(base)} (points)"),
            axis(autorange="reversed", automargin=True),
            figures.height(len(names), 34, beside=160, least=380),
            {"showlegend": False, "shapes": [figures.vertical(0, stroke(ORANGE, width=None))]},
        ),
    )


def _resolution(primary: Sequence[Change]) -> str:
    """How small a difference these items can show."""
    accuracies = [change.comparison for change in primary if change.kind == "mean"]
    widths = [50 * (one.high - one.low) for one in accuracies if one.high is not None and one.low is not None]
    if not widths:
        return ""
    return (
        f"With these items a difference of accuracy shows from about {min(widths):.1f} to {max(widths):.1f} points on, "
        "half the width of its interval."
    )


def _scores(result: EvalResult) -> Table:
    rows = [
        [
            score.task,
            score.metric + (" *" if score.primary else ""),
            score.variant,
            score.shown,
            score.interval or ABSENT,
            score.n,
            score.cut or ABSENT,
        ]
        for score in result.scores
    ]
    return Table(
        "Scores",
        ["task", "metric", "variant", "score", "95 % interval", "items", "cut off"],
        rows,
        takeaway="Shares of right answers with Wilson's interval, others with Student's t by item. An asterisk marks "
        "what a benchmark is judged by. Cut off: answers that were not allowed to be longer.",
    )


def _differences(result: EvalResult) -> Table:
    rows = [
        [
            change.task,
            change.metric + (" *" if change.primary else ""),
            change.variant,
            f"{100 * found.difference:+.1f}",
            ABSENT if found.low is None or found.high is None else f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
            found.wins,
            found.losses,
            found.ties,
            f"{found.adjusted:.3g}",
        ]
        for change, found in ((change, change.comparison) for change in result.changes)
    ]
    return Table(
        f"Differences from {result.changes[0].base}, item by item",
        ["task", "metric", "variant", "difference", "95 % interval", "wins", "losses", "ties", "p"],
        rows,
        takeaway="In points, or hundredths of a nat for log-likelihood, with its interval (Tango's score interval, or "
        "Student's t by item where an item is not just right or wrong); p by the mid-p McNemar test, or by sign flips. "
        "What a benchmark is judged by "
        "(*) is corrected, all of it together (Holm); the rest describes.",
    )


def _conclusions(result: EvalResult) -> Table:
    rows = [
        [change.task, change.metric, change.variant, change.sentence] for change in result.changes if change.primary
    ]
    return Table("What follows", ["task", "metric", "variant", "conclusion"], rows)


def _chosen(result: EvalResult) -> Table:
    rows = [
        [
            one.task,
            one.metric,
            one.variant,
            one.selected_on,
            "the same items: too good" if one.same_items else "other items",
            one.change.sentence,
        ]
        for one in result.chosen
    ]
    columns = ["task", "metric", "chosen", "chosen by (items)", "judged on", "what follows"]
    return Table("The variant that was chosen, judged", columns, rows, takeaway=" ".join(result.notes))


def _flips(result: EvalResult, change: Change) -> list[Table]:
    better: list[list[Any]] = []
    worse: list[list[Any]] = []
    rising = change.comparison.higher_is_better
    for item, before, after in result.flips(change):
        up = after["scores"][change.metric][0] > before["scores"][change.metric][0]
        row = [item, _short(result.prompts.get(before["prompt"], before["prompt"]), tail=True)]
        (better if up == rising else worse).append([*row, _short(before["output"]), _short(after["output"])])
    tables = []
    for rows, what in ((better, "won"), (worse, "lost")):
        if rows:
            title = f"{result.place(change)}: {len(rows)} items {what} by {change.variant}"
            if len(rows) > FLIPS:
                title += f", the first {FLIPS}"
            columns = ["item", "prompt", change.base, change.variant]
            tables.append(Table(title, columns, rows[:FLIPS], folded=True, prose=True))
    return tables


def _short(output: Any, *, tail: bool = False) -> str:
    text = re.sub(r"\n\s*\n", "\n", output) if isinstance(output, str) else str(output)
    if len(text) <= _LONGEST:
        return text
    return f"…{text[-_LONGEST:]}" if tail else f"{text[:_LONGEST]}…"


def write_eval_report(result: EvalResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes an evaluation's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `evaluate`, `select` or `compare_runs` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    shared = result.settings["shared"]
    runs = shared.get("runs") or {"": shared}
    facts = [fact for name, run in runs.items() for fact in _run_facts(name, run)]
    facts += [_task_fact(task, about) for task, about in result.settings["tasks"].items()]
    name = ", ".join(dict.fromkeys(run["model"]["name"] for run in runs.values()))
    page = Page(name, [section(result)], result.notes, facts, {"evaluation": result.to_dict()})
    return write_page(page, out, command=command)


def _run_facts(name: str, run: Mapping[str, Any]) -> Facts:
    model = run["model"]
    return [
        (f"Model {name}".strip(), f"{model['name']}, {model['dtype']}, fingerprint {model['fingerprint']}"),
        ("Asked", "through the chat template" if run["chat"] else "as plain text, without a chat template"),
        ("Items at once, device", f"{run['batch_size']}, {run['device']}"),
        versions_fact(run["versions"]),
    ]


def _task_fact(task: str, about: Mapping[str, Any]) -> tuple[str, str]:
    versions = ", ".join(sorted(set(about["lm_eval_tasks"].values())))
    source = ", ".join(f"{file} {sha[:12]}" for file, sha in about["data_sha256"].items()) or "the hub"
    return task, f"{about['cite']}; lm-eval task version {versions}; items from {source}"
