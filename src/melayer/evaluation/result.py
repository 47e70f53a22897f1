"""What an evaluation found: scores with their intervals, and what changed against the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from melayer.numerics import paired
from melayer.numerics.paired import Comparison
from melayer.version import __version__

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Score:
    """One metric of one task under one variant."""

    task: str
    metric: str
    variant: str
    value: float
    low: float | None
    high: float | None
    """Wilson interval of a share of right answers; None for other values."""
    n: int
    """Items."""
    kind: str
    """`mean`, `other`, or the ratio of log-likelihoods that it is."""
    primary: bool
    """Whether the benchmark is judged by it."""


@dataclass(frozen=True)
class Change:
    """One metric of one task: a variant against the base on the same items."""

    task: str
    metric: str
    variant: str
    base: str
    kind: str
    """`mean`; or a ratio of log-likelihoods, compared as log-likelihood in nats for each word or byte."""
    primary: bool
    """Primary comparisons are corrected together (Holm); the others describe."""
    comparison: Comparison

    @property
    def sentence(self) -> str:
        """What can be concluded."""
        if self.kind == "mean":
            return self.comparison.sentence()
        unit = "hundredths of a nat a byte" if self.kind != "word_perplexity" else "hundredths of a nat a word"
        return self.comparison.sentence(unit=unit)


@dataclass(frozen=True)
class Chosen:
    """The variant that is best on some items, judged on others."""

    task: str
    metric: str
    variant: str
    selected_on: int
    """How many items it was chosen by."""
    value: float
    """Its value there, which flatters it."""
    same_items: bool
    """Whether it was judged on items that it was chosen by."""
    change: Change


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found, or `compare_runs`."""

    settings: dict[str, Any]
    """`shared`, `tasks` and `variants`."""
    scores: tuple[Score, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    answers: Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """[task][variant][item] the stored answer; not part of `to_dict()`."""
    prompts: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """[prompt hash] the prompt, for a report; empty for stored runs, and not part of `to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "settings": self.settings,
            "sentence": self.sentence,
            "scores": [asdict(score) for score in self.scores],
            "changes": [asdict(change) | {"sentence": change.sentence} for change in self.changes],
            "chosen": [asdict(one) for one in self.chosen],
            "notes": list(self.notes),
        }

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        judged = [change for change in self.changes if change.primary]
        if not judged:
            return f"{len(self.scores)} figures of one variant; nothing was compared."
        gains: list[Change] = []
        losses: list[Change] = []
        for change in judged:
            if change.comparison.shown:
                up = change.comparison.difference > 0
                (gains if up == change.comparison.higher_is_better else losses).append(change)

        def named(changes: Sequence[Change]) -> str:
            return f" ({', '.join(f'{c.variant} on {self.place(c)}' for c in changes)})" if changes else ""

        return (
            f"Of {len(judged)} comparisons with {judged[0].base}, corrected for their number (Holm), {len(gains)} show "
            f"a gain{named(gains)}, {len(losses)} a loss{named(losses)}, and {len(judged) - len(gains) - len(losses)} "
            "no difference."
        )

    def place(self, change: Change) -> str:
        """The task of a comparison, with the metric where the task is judged by several."""
        metrics = {one.metric for one in self.changes if one.primary and one.task == change.task}
        return change.task if len(metrics) < 2 else f"{change.task} {change.metric}"

    def flips(self, change: Change) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """The items on which a comparison's variants differ: (item, the base's answer, the other's)."""
        base, other = self.answers[change.task][change.base], self.answers[change.task][change.variant]
        for item in base:
            values = [answers[item]["scores"].get(change.metric) for answers in (base, other)]
            if None not in values and values[0] != values[1]:
                yield item, base[item], other[item]


# --- figures from answers ------------------------------------------------------------------------------------------

_Answers = Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]]
_Aggregates = Mapping[tuple[str, str], Callable[[list[Any]], float]]


def _result(
    settings: dict[str, Any], answers: _Answers, prompts: Mapping[str, str], aggregates: _Aggregates
) -> EvalResult:
    scores, changes, notes = [], [], []
    for task, by_variant in answers.items():
        base = next(iter(by_variant))
        for metric, about in settings["tasks"][task]["metrics"].items():
            for label, rows in by_variant.items():
                score = _score(task, metric, about, label, rows, aggregates)
                if score is not None:
                    scores.append(score)
            if about["kind"] == "other":
                notes.append(f"{metric} of {task} is no mean over items, so its variants are not compared in pairs.")
                continue
            for label in list(by_variant)[1:]:
                change = _change(task, metric, about, base, label, by_variant)
                if change is not None:
                    changes.append(change)
        notes += _cut_off(task, settings["tasks"][task]["generation"], by_variant)
    judged = paired.holm([change.comparison for change in changes if change.primary])
    corrected = iter(judged)
    changes = [replace(one, comparison=next(corrected)) if one.primary else one for one in changes]
    return EvalResult(settings, tuple(scores), tuple(changes), tuple(notes), (), answers, prompts)


def _cut_off(
    task: str, generation: Mapping[str, Any] | None, by_variant: Mapping[str, Mapping[str, dict[str, Any]]]
) -> list[str]:
    """A note where answers ended because they were not allowed to be longer."""
    if generation is None:
        return []
    limit = generation["max_gen_toks"]
    # The text's tokens are counted anew, and may come to a few less than were generated.
    long = {label: sum(row["tokens"] >= 0.95 * limit for row in rows.values()) for label, rows in by_variant.items()}
    if not any(long.values()):
        return []
    n = len(next(iter(by_variant.values())))
    counts = ", ".join(f"{count} under {label}" for label, count in long.items())
    return [f"Answers to {task} of at least 95 % of the {limit} tokens allowed, of {n}: {counts}."]


def _score(
    task: str,
    metric: str,
    about: Mapping[str, Any],
    label: str,
    rows: Mapping[str, dict[str, Any]],
    aggregates: _Aggregates,
) -> Score | None:
    if about["kind"] == "other":
        values = [row["scores"][metric] for row in rows.values() if metric in row["scores"]]
        aggregate = aggregates.get((task, metric))
        if aggregate is None or not values:
            return None
        return Score(task, metric, label, float(aggregate(values)), None, None, len(values), "other", about["primary"])
    pairs = _pairs(rows, rows, metric)
    if not pairs:
        return None
    low = high = None
    if about["kind"] == "mean" and all(value in (0, 1) and size == 1 for value, size in pairs):
        share = paired.wilson(int(sum(value for value, _ in pairs)), len(pairs))
        low, high = share.low, share.high
    return Score(
        task, metric, label, _value(about["kind"], pairs), low, high, len(pairs), about["kind"], about["primary"]
    )


def _change(
    task: str,
    metric: str,
    about: Mapping[str, Any],
    base: str,
    label: str,
    by_variant: Mapping[str, Mapping[str, dict[str, Any]]],
) -> Change | None:
    before, after = (_pairs(by_variant[one], by_variant[one], metric) for one in (base, label))
    if not before:
        return None
    comparison = paired.compare(
        [value for value, _ in before],
        [value for value, _ in after],
        [size for _, size in before],
        # A log-likelihood is better the higher it is, whatever its perplexity.
        higher_is_better=about["higher_is_better"] or about["kind"] != "mean",
    )
    return Change(task, metric, label, base, about["kind"], about["primary"], comparison)


def _pairs(rows: Mapping[str, dict[str, Any]], keys: Iterable[str], metric: str) -> list[tuple[float, float]]:
    """Value and size of each item that has the metric: one on safe prompts says nothing about unsafe ones."""
    return [tuple(rows[key]["scores"][metric]) for key in keys if metric in rows[key]["scores"]]


def _value(kind: str, pairs: Sequence[tuple[float, float]]) -> float:
    if not pairs:
        return math.nan
    mean = math.fsum(value for value, _ in pairs) / math.fsum(size for _, size in pairs)
    if kind == "mean":
        return mean
    return -mean / math.log(2) if kind == "bits_per_byte" else math.exp(-mean)
