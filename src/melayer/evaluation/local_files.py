"""The tasks' items from files at hand: which file holds which task, and its rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melayer.data.documents import Rejected
from melayer.data.encodings import CONVERT
from melayer.data.entries import BadRowError, Entry, entries, whole
from melayer.data.files import is_there, printable, shown
from melayer.data.formats import format_of
from melayer.errors import InputError, border
from melayer.evaluation.row_checks import checked_row

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class LocalBenchmark:
    """A benchmark that can be read from local files."""

    task: str
    """lm-eval's name."""
    folder: str
    """Of lm-eval's tasks."""
    files: Mapping[str, str]
    """Split: file below the data directory."""
    fields: tuple[str, ...]
    """That each row must have."""
    primary: tuple[str, ...]
    cite: str


BENCHMARKS = {
    "gsm8k": LocalBenchmark(
        "gsm8k",
        "gsm8k",
        {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        ("question", "answer"),
        ("exact_match,flexible-extract",),
        "Cobbe et al. 2021, arXiv:2110.14168",
    ),
    "math500": LocalBenchmark(
        "minerva_math500",
        "minerva_math",
        {"test": "math500/test.jsonl"},
        ("problem", "solution", "answer"),
        ("math_verify",),
        "Hendrycks et al. 2021, arXiv:2103.03874; the 500: Lightman et al. 2023, arXiv:2305.20050",
    ),
    "aime24": LocalBenchmark(
        "aime24",
        "aime",
        {"train": "aime24/train.jsonl"},
        ("Problem", "Answer"),
        ("exact_match",),
        "American Invitational Mathematics Examination 2024",
    ),
    "mmlu": LocalBenchmark(
        "mmlu",
        "mmlu/default",
        {"test": "mmlu/test.jsonl", "dev": "mmlu/dev.jsonl"},
        ("subject", "question", "choices", "answer"),
        ("acc",),
        "Hendrycks et al. 2021, arXiv:2009.03300",
    ),
    "ifeval": LocalBenchmark(
        "ifeval",
        "ifeval",
        {"train": "ifeval/input_data.jsonl"},
        ("key", "prompt", "instruction_id_list", "kwargs"),
        ("prompt_level_strict_acc",),
        "Zhou et al. 2023, arXiv:2311.07911",
    ),
    "wikitext2": LocalBenchmark(
        "wikitext",
        "wikitext",
        {"test": "wikitext2/wiki.test.raw"},
        ("page",),
        ("word_perplexity",),
        "Merity et al. 2016, arXiv:1609.07843",
    ),
    "xstest": LocalBenchmark(
        "xstest",
        "",
        {"test": "xstest/xstest_prompts.csv"},
        ("id", "prompt", "label"),
        ("refused_safe", "refused_unsafe"),
        "Röttger et al. 2024, arXiv:2308.01263",
    ),
}
NAMES = tuple(BENCHMARKS)
"""The benchmarks that can be read from local files; any other task of lm-eval comes from the hub."""
ALIASES = {benchmark.task: name for name, benchmark in BENCHMARKS.items()}
"""Our names by lm-eval's."""


@dataclass(frozen=True)
class LocalRows:
    """The rows of a benchmark's files."""

    splits: Mapping[str, Rows]
    notes: tuple[str, ...] = ()
    """On the rows that are left out: how many of which file, and why the first are."""


def custom_dataset(splits: Mapping[str, Rows]) -> Callable[..., dict[str, Any]]:
    """What lm-eval calls instead of reading from the hub: the rows of each split."""

    def made(**_: Any) -> dict[str, Any]:
        import datasets

        with border("The rows of a benchmark do not make one table", "Give each field the same type in all rows."):
            return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    return made


def read_splits(name: str, data: Path) -> LocalRows:
    """The rows of a benchmark's files; those that cannot be asked or scored are left out, counted and named.

    Args:
        name: One of `NAMES`.
        data: The directory above its files.

    Raises:
        InputError: A file is missing or cannot be read, or none of its rows can be used.
    """
    benchmark, splits, notes = BENCHMARKS[name], {}, []
    for split, file in benchmark.files.items():
        path = data / file
        if not is_there(path):
            raise InputError(f"{name} needs {shown(path)}, which is missing. Add it, or leave --data out.")
        splits[split], rejected = _rows(name, path, benchmark.fields)
        if not splits[split]:
            why = f": {'; '.join(rejected.first)}" if rejected.count else ""
            raise InputError(
                f"{shown(path)} holds no items that {name} can ask{why}. Its rows need {', '.join(benchmark.fields)}."
            )
        notes.append(rejected.note)
    return LocalRows(splits, tuple(filter(None, notes)))


def checked_rows(name: str, rows: Iterable[tuple[str, Callable[[], Any]]], rejected: Rejected) -> Rows:
    """The rows that can be asked and scored.

    Args:
        name: The benchmark.
        rows: Where each stands, and what gives it.
        rejected: Where the others are counted.
    """
    kept = []
    for place, row in rows:
        try:
            kept.append(checked_row(name, BENCHMARKS[name].fields, row()))
        except BadRowError as error:
            rejected.add(f"{place}: {error}")
    return kept


def _rows(name: str, path: Path, fields: tuple[str, ...]) -> tuple[Rows, Rejected]:
    rejected = Rejected(printable(path.name))
    of_wikitext = fields == ("page",)
    format = format_of(path, whole=of_wikitext)
    if format is None:
        return [], rejected
    if of_wikitext:
        try:
            pages = documents(whole(path, format).value())
        except BadRowError as error:
            raise InputError(f"{shown(path)} cannot be read as text: {error}. {CONVERT}") from error
        return checked_rows(
            name, ((f"article {at}", _given({"page": page})) for at, page in enumerate(pages)), rejected
        ), rejected
    found = (entry for entry in entries(path, format) if isinstance(entry, Entry))
    return checked_rows(name, ((entry.place, entry.value) for entry in found), rejected), rejected


def _given(value: Any) -> Callable[[], Any]:
    return lambda: value


def documents(text: str) -> list[str]:
    """WikiText's one file cut into its articles, each of which begins with a heading of the first order.

    Example:
        >>> len(documents(" \\n = A = \\n \\n x \\n = = B = = \\n y \\n = C = \\n z \\n"))
        2
    """
    found: list[list[str]] = []
    # Not splitlines(), which also cuts at what ends no line, see `data.entries`.
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    for place, line in enumerate(lines):
        # A line such as ` = 3 = ` within an article stands beside text; a heading stands between empty lines.
        alone = not "".join(lines[max(0, place - 1) : place] + lines[place + 1 : place + 2]).strip()
        if re.fullmatch(r" = [^=].* = \n?", line) and (alone or not found):
            found.append([])
        if not found:
            if not line.strip():
                continue
            found.append([])
        found[-1].append(line)
    return ["".join(lines) for lines in found]


def splits_by_task(name: str, splits: Mapping[str, Rows]) -> dict[str, dict[str, Rows]]:
    """For each of lm-eval's tasks its splits; no splits where they come from the hub.

    Raises:
        InputError: A subject of MMLU has no solved examples.
    """
    if name != "mmlu" or not splits:
        return {BENCHMARKS[name].task: dict(splits)}
    subjects = dict.fromkeys(row["subject"] for row in splits["test"])
    shots = {row["subject"] for row in splits["dev"]}
    for subject in subjects:
        if subject not in shots:
            raise InputError(f"mmlu/dev.jsonl has no solved examples of {subject}, of which mmlu/test.jsonl has items.")
    return {
        f"mmlu_{subject}": {split: [row for row in rows if row["subject"] == subject] for split, rows in splits.items()}
        for subject in subjects
    }
