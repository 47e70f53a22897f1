"""The tasks' items from files at hand: which file holds which task, and its rows."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melayer.errors import InputError

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


def custom_dataset(splits: Mapping[str, Rows]) -> Callable[..., dict[str, Any]]:
    """What lm-eval calls instead of reading from the hub: the rows of each split."""

    def made(**_: Any) -> dict[str, Any]:
        import datasets

        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    return made


def read_splits(name: str, data: Path) -> dict[str, Rows]:
    """The rows of a benchmark's files.

    Args:
        name: One of `NAMES`.
        data: The directory above its files.

    Raises:
        InputError: A file is missing, cannot be read or holds no items, or a row lacks a field.
    """
    benchmark, splits = BENCHMARKS[name], {}
    for split, file in benchmark.files.items():
        path = data / file
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise InputError(f"{name} needs {path}, which is missing. Add it, or leave --data out.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}. {name} needs a UTF-8 file.") from error
        rows = _rows(path, text)
        if not rows:
            raise InputError(f"{path} holds no items.")
        for place, row in enumerate(rows):
            missing = [field for field in benchmark.fields if field not in row]
            if missing:
                raise InputError(
                    f"Row {place} of {path} has no field {missing[0]!r}: it has {', '.join(map(str, row))}. "
                    f"{name} needs {', '.join(benchmark.fields)}."
                )
        splits[split] = rows
    return splits


def _rows(path: Path, text: str) -> Rows:
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.suffix == ".raw":
        return [{"page": page} for page in documents(text)]
    rows = []
    # Not splitlines(), which also cuts at separators that JSON strings may hold.
    for place, line in enumerate(text.removesuffix("\n").split("\n") if text else []):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"Line {place + 1} of {path} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InputError(f"Line {place + 1} of {path} is no JSON object.")
        rows.append(row)
    return rows


def documents(text: str) -> list[str]:
    """WikiText's one file cut into its articles, each of which begins with a heading of the first order.

    Example:
        >>> len(documents(" \\n = A = \\n \\n x \\n = = B = = \\n y \\n = C = \\n z \\n"))
        2
    """
    found: list[list[str]] = []
    lines = text.splitlines(keepends=True)
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
