"""From stored answers to figures: scores with their intervals, and what changed against the first variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from melayer.evaluation.result import Answers, Change, EvalResult, Score, StoredAnswer
from melayer.evaluation.settings import EvalSettings, MetricSettings, TaskSettings
from melayer.numerics import paired

Aggregates = Mapping[tuple[str, str], Callable[[list[Any]], float]]
"""By task and metric what lm-eval makes of all items' values, where that is no mean."""


def scored(
    settings: EvalSettings, answers: Answers, prompts: Mapping[str, str], aggregates: Aggregates | None = None
) -> EvalResult:
    """All figures of an evaluation.

    Args:
        settings: What the answers depend on.
        answers: Of each task the first variant is what the others are held to.
        prompts: By their hash, for a report.
        aggregates: Where one is missing, the metric has no score.
    """
    scores, changes, notes = [], [], []
    for task, by_variant in answers.items():
        about = settings["tasks"][task]
        base = next(iter(by_variant))
        for metric, counted in about["metrics"].items():
            aggregate = (aggregates or {}).get((task, metric))
            found = [_score(task, metric, counted, label, rows, aggregate) for label, rows in by_variant.items()]
            scores += [score for score in found if score is not None]
            if counted["kind"] == "other":
                notes.append(f"{metric} of {task} is no mean over items, so its variants are not compared in pairs.")
                continue
            compared = [change_of(task, metric, counted, base, label, by_variant) for label in list(by_variant)[1:]]
            changes += [change for change in compared if change is not None]
        notes += _cut_off(task, about, by_variant)
    judged = paired.holm([change.comparison for change in changes if change.primary])
    corrected = iter(judged)
    changes = [replace(one, comparison=next(corrected)) if one.primary else one for one in changes]
    return EvalResult(settings, tuple(scores), tuple(changes), tuple(notes), (), answers, prompts)


def change_of(
    task: str,
    metric: str,
    counted: MetricSettings,
    base: str,
    variant: str,
    by_variant: Mapping[str, Mapping[str, StoredAnswer]],
) -> Change | None:
    """One metric of one task: a variant against the base; None where no item has the metric."""
    before, after = (values_of(by_variant[label], by_variant[label], metric) for label in (base, variant))
    if not before:
        return None
    comparison = paired.compare(
        [value for value, _ in before],
        [value for value, _ in after],
        [size for _, size in before],
        # A log-likelihood is better the higher it is, whatever its perplexity.
        higher_is_better=counted["higher_is_better"] or counted["kind"] != "mean",
    )
    return Change(task, metric, variant, base, counted["kind"], counted["primary"], comparison)


def values_of(rows: Mapping[str, StoredAnswer], keys: Iterable[str], metric: str) -> list[tuple[float, float]]:
    """Value and size of each item that has the metric: one on safe prompts says nothing about unsafe ones."""
    return [tuple(rows[key]["scores"][metric]) for key in keys if metric in rows[key]["scores"]]


def together(kind: str, values: Sequence[tuple[float, float]]) -> float:
    """The metric over all items, from the value and size of each; NaN without items."""
    if not values:
        return math.nan
    mean = math.fsum(value for value, _ in values) / math.fsum(size for _, size in values)
    if kind == "mean":
        return mean
    return -mean / math.log(2) if kind == "bits_per_byte" else math.exp(-mean)


def _score(
    task: str,
    metric: str,
    counted: MetricSettings,
    variant: str,
    rows: Mapping[str, StoredAnswer],
    aggregate: Callable[[list[Any]], float] | None,
) -> Score | None:
    kind, primary = counted["kind"], counted["primary"]
    if kind == "other":
        raw = [row["scores"][metric] for row in rows.values() if metric in row["scores"]]
        if aggregate is None or not raw:
            return None
        return Score(task, metric, variant, float(aggregate(raw)), None, None, len(raw), kind, primary)
    values = values_of(rows, rows, metric)
    if not values:
        return None
    low = high = None
    if kind == "mean" and all(value in (0, 1) and size == 1 for value, size in values):
        share = paired.wilson(int(sum(value for value, _ in values)), len(values))
        low, high = share.low, share.high
    return Score(task, metric, variant, together(kind, values), low, high, len(values), kind, primary)


def _cut_off(task: str, about: TaskSettings, by_variant: Mapping[str, Mapping[str, StoredAnswer]]) -> list[str]:
    """A note where answers ended because they were not allowed to be longer."""
    if about["generation"] is None:
        return []
    limit = about["generation"]["max_gen_toks"]
    # The text's tokens are counted anew, and may come to a few less than were generated.
    long = {label: sum(row["tokens"] >= 0.95 * limit for row in rows.values()) for label, rows in by_variant.items()}
    if not any(long.values()):
        return []
    n = len(next(iter(by_variant.values())))
    counts = ", ".join(f"{count} under {label}" for label, count in long.items())
    return [f"Answers to {task} of at least 95 % of the {limit} tokens allowed, of {n}: {counts}."]
