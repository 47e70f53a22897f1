"""From stored answers to figures: scores with their intervals, and what changed against the first variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from melayer.evaluation.notes import notes_of
from melayer.evaluation.result import Answers, Change, EvalResult, Score, StoredAnswer
from melayer.evaluation.settings import EvalSettings, MetricSettings
from melayer.numerics import paired
from melayer.numerics.finite import finite
from melayer.numerics.intervals import ratio_interval

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
        generated = about["generation"] is not None
        for metric, counted in about["metrics"].items():
            aggregate = (aggregates or {}).get((task, metric))
            keys = keys_of(by_variant, metric)
            found = [
                _score(task, metric, counted, label, [rows[key] for key in keys], aggregate, generated)
                for label, rows in by_variant.items()
            ]
            scores += [score for score in found if score is not None]
            if counted["kind"] == "other":
                notes.append(f"{metric} of {task} is no mean over items, so its variants are not compared in pairs.")
                continue
            compared = [change_of(task, metric, counted, base, label, by_variant) for label in list(by_variant)[1:]]
            changes += [change for change in compared if change is not None]
        notes += notes_of(task, about, by_variant)
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
    keys = keys_of(by_variant, metric)
    before, after = (values_of(by_variant[label], keys, metric) for label in (base, variant))
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


def keys_of(by_variant: Mapping[str, Mapping[str, StoredAnswer]], metric: str) -> list[str]:
    """The items that have the metric under every variant, so that all of them are counted on the same ones."""
    first, *others = by_variant.values()
    return [
        key
        for key, row in first.items()
        if metric in row["scores"] and all(metric in of[key]["scores"] for of in others)
    ]


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
    if kind == "bits_per_byte":
        return -mean / math.log(2)
    return math.exp(-mean) if mean > -700 else math.inf  # e^709 is the largest number that there is


def _score(
    task: str,
    metric: str,
    counted: MetricSettings,
    variant: str,
    rows: Sequence[StoredAnswer],
    aggregate: Callable[[list[Any]], float] | None,
    generated: bool,
) -> Score | None:
    kind, primary = counted["kind"], counted["primary"]
    n_cut, unknown = _counted_cut(rows) if generated else (None, 0)
    if kind == "other":
        raw = [row["scores"][metric] for row in rows]
        value = None if aggregate is None or not raw else _aggregated(aggregate, raw)
        if value is None:
            return None
        return Score(task, metric, variant, value, None, None, len(raw), kind, primary, n_cut, unknown)
    values = [(float(value), float(size)) for value, size in (row["scores"][metric] for row in rows)]
    if not values:
        return None
    low, high = _interval(kind, values)
    value = finite(together(kind, values))
    return Score(task, metric, variant, value, low, high, len(values), kind, primary, n_cut, unknown)


def _aggregated(aggregate: Callable[[list[Any]], float], raw: list[Any]) -> float | None:
    """The metric over all items; None where it is no number, or lm-eval cannot make it."""
    try:
        return finite(aggregate(raw))
    except Exception:  # noqa: BLE001 - whatever a task's own code raises
        return None


def _interval(kind: str, values: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Both ends of the interval of the metric over items."""
    sums, sizes = zip(*values, strict=True)
    if kind == "mean" and all(value in (0, 1) and size == 1 for value, size in values):
        share = paired.wilson(int(sum(sums)), len(sums))
        return share.low, share.high
    if kind == "mean":
        if not all(0 <= value <= size for value, size in values):
            return ratio_interval(sums, sizes) or (None, None)
        # One item more that is right in all of its parts and one that is wrong in all of them.
        low, high = ratio_interval(sums, sizes, added=(sum(sizes) / len(sizes), 0)) or (0.0, 1.0)
        return max(low, 0.0), min(high, 1.0)
    ends = ratio_interval(sums, sizes)
    if ends is None:
        return None, None
    # The perplexity falls with the log-likelihood.
    return finite(together(kind, [(ends[1], 1.0)])), finite(together(kind, [(ends[0], 1.0)]))


def _counted_cut(rows: Sequence[StoredAnswer]) -> tuple[int | None, int]:
    """How many answers were cut off, and of how many that is not known; None where nothing was generated."""
    unknown = sum("cut" not in row for row in rows)
    known = [row["cut"] for row in rows if row.get("cut") is not None]
    return (sum(map(bool, known)) if known else None), unknown
