"""Choosing a variant on some items and reporting it on others, and comparing two stored runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from melayer.errors import InputError
from melayer.evaluation.result import Chosen, EvalResult, StoredAnswer
from melayer.evaluation.scoring import change_of, keys_of, scored, together, values_of
from melayer.evaluation.settings import EvalSettings
from melayer.evaluation.store import Store, file_of, order_of
from melayer.numerics import paired


def select(result: EvalResult, *, on: str, report_on: str, allow_same_items: bool = False) -> EvalResult:
    """Chooses the best variant of each task on some items and judges it on others.

    Args:
        result: Of several variants besides the first.
        on: The items to choose by: `even`, `odd`, or places such as `0-99,150-`.
        report_on: The items to judge on, in the same words.
        allow_same_items: Judge on items that were used to choose; the result is labelled.

    Returns:
        The result of the items in `report_on`, with what was chosen.

    Raises:
        InputError: Items are used for both, or none is left.
    """
    tasks, base = result.settings["tasks"], next(iter(result.settings["variants"]))
    chosen = []
    kept: dict[str, dict[str, dict[str, StoredAnswer]]] = {}
    for task, by_variant in result.answers.items():
        first, second = split(task, list(by_variant[base]), on, report_on, allow_same_items)
        shared = set(first) & set(second)
        kept[task] = {label: {key: answers[key] for key in second} for label, answers in by_variant.items()}
        others = [label for label in by_variant if label != base]
        for metric, about in tasks[task]["metrics"].items():
            if not about["primary"] or about["kind"] == "other" or not others:
                continue
            known = set(keys_of(by_variant, metric))
            by = [key for key in first if key in known]
            values = {label: together(about["kind"], values_of(by_variant[label], by, metric)) for label in others}
            rising = about["higher_is_better"]
            best = max(others, key=lambda label: values[label] if rising else -values[label])
            change = change_of(task, metric, about, base, best, kept[task])
            if change is not None:
                chosen.append(Chosen(task, metric, best, len(first), values[best], bool(shared), change))
    adjusted = paired.holm([one.change.comparison for one in chosen])
    chosen = [replace(one, change=replace(one.change, comparison=c)) for one, c in zip(chosen, adjusted, strict=True)]
    found = scored(result.settings, kept, result.prompts)
    note = f"Chosen on the items {on}, judged on {report_on}; all figures are of {report_on}."
    if any(one.same_items for one in chosen):
        note += " Chosen and judged by the same items, as was asked for: the gain of a chosen variant is too good."
    return replace(found, chosen=tuple(chosen), notes=(*found.notes, note))


def split(
    task: str, items: Sequence[str], on: str, report_on: str, allow_same_items: bool
) -> tuple[list[str], list[str]]:
    """The items of a task to choose by, and those to judge on.

    Args:
        task: Its name, for what is said.
        items: Their keys, `task/place`.
        on: The items to choose by: `even`, `odd`, or places such as `0-99,150-`.
        report_on: The items to judge on, in the same words.
        allow_same_items: Whether the two may overlap.

    Raises:
        InputError: Items are used for both, or none is left.
    """
    first, second = ([key for key in items if _within(key, part)] for part in (on, report_on))
    shared = set(first) & set(second)
    if shared and not allow_same_items:
        raise InputError(
            f"{len(shared)} items of {task} are in --select-on {on} and in --report-on {report_on}: a variant that "
            "is chosen and judged by the same items looks better than it is. Give parts that do not overlap, such "
            "as even and odd, or --allow-same-items."
        )
    if not first or not second:
        raise InputError(
            f"{task} has no items in {on if not first else report_on}: it has {len(items)}, with places from 0."
        )
    return first, second


def compare_runs(first: str | Path, second: str | Path) -> EvalResult:
    """Two stored runs, compared on the items that both answered; the first one's first variant is the base.

    Args:
        first: A directory that `evaluate` kept its answers in.
        second: Another.

    Raises:
        InputError: One is no run, or they have no items in common that were asked in the same words.
    """
    runs = [Store.read(file_of(Path(where))) for where in (first, second)]
    tasks = {name: about for name, about in runs[0][0]["tasks"].items() if name in runs[1][0]["tasks"]}
    names = [str(Path(where)) for where in (first, second)]
    answers: dict[str, dict[str, dict[str, StoredAnswer]]] = {}
    variants: dict[str, Any] = {}
    notes = []
    for task in tasks:
        found: dict[str, dict[str, StoredAnswer]] = {}
        for name, (of, records) in zip(names, runs, strict=True):
            for label, about in of["variants"].items():
                rows = {key[2]: record for key, record in records.items() if key[:2] == (task, label)}
                if rows:
                    found[f"{label} ({name})"] = rows
                    variants[f"{label} ({name})"] = about
        both = all(any(key[0] == task for key in records) for _, records in runs)
        common = set.intersection(*(set(rows) for rows in found.values())) if both else set()
        alike = [key for key in common if len({rows[key]["prompt"] for rows in found.values()}) == 1]
        if len(alike) < len(common):
            notes.append(f"{task}: {len(common) - len(alike)} items were asked in other words and are left out.")
        if alike:
            ordered = sorted(alike, key=order_of)
            answers[task] = {label: {key: rows[key] for key in ordered} for label, rows in found.items()}
    if not answers:
        raise InputError(
            f"{names[0]} and {names[1]} have no items in common that were asked in the same words. "
            "Give runs of the same tasks and chat settings."
        )
    settings: EvalSettings = {
        "shared": {"runs": {name: of["shared"] for name, (of, _) in zip(names, runs, strict=True)}},
        "tasks": {task: tasks[task] for task in answers},
        "variants": variants,
    }
    result = scored(settings, answers, {})
    return replace(result, notes=(*result.notes, *notes))


def _within(key: str, part: str) -> bool:
    """Whether an item's place is in `even`, `odd` or ranges such as `0-99,150-`."""
    place = int(key.rpartition("/")[2])
    if part in ("even", "odd"):
        return place % 2 == (part == "odd")
    for piece in part.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"{part!r} names no items; expected even, odd, or places such as 0-99,150-.")
        if int(first) <= place <= (int(last) if last else math.inf if dash else int(first)):
            return True
    return False
