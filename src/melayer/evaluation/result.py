"""What an evaluation found: scores with their intervals, and what changed against the baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired

from typing_extensions import TypedDict

from melayer.evaluation.settings import EvalSettings
from melayer.numerics.paired import Comparison
from melayer.version import __version__


class StoredAnswer(TypedDict):
    """What one variant said to one item, as a line of the store holds it."""

    task: str
    variant: str
    item: str
    prompt: str
    """Its hash."""
    output: Any
    """The text; or for each choice its log-likelihood and whether it is the likeliest text; or the whole text's."""
    scores: dict[str, Any]
    """For each metric the item's value and size; or lm-eval's own value where the metric is no mean."""
    tokens: int
    """Generated, or scored."""
    seconds: float
    """The batch's time shared out evenly."""
    cut: NotRequired[bool | None]
    """Whether a generated answer ended because it was not allowed to be longer; None where nothing is generated, and
    missing in what an older version kept."""
    failed: NotRequired[str | None]
    """Why it has no scores, where it has none."""


Answers = Mapping[str, Mapping[str, Mapping[str, StoredAnswer]]]
"""[task][variant][item]."""


@dataclass(frozen=True)
class Score:
    """One metric of one task under one variant."""

    task: str
    metric: str
    variant: str
    value: float | None
    """None where it is larger than any number that there is."""
    low: float | None
    high: float | None
    """Of right answers: Wilson's interval. Of shares of an item's parts, and of ratios of log-likelihoods: Student's t
    by item (`intervals.ratio_interval`). None where neither is to be had."""
    n: int
    """Items."""
    kind: str
    """`mean`, `other`, or the ratio of log-likelihoods that it is."""
    primary: bool
    """Whether the benchmark is judged by it."""
    n_cut: int | None = None
    """Answers among them that ended because they were not allowed to be longer; None where nothing is generated."""
    n_cut_unknown: int = 0
    """Answers among them of which that is not known, since an older version kept them."""

    @property
    def shown(self) -> str:
        """The value for people."""
        return self._written(self.value)

    @property
    def interval(self) -> str | None:
        """The interval for people; None where there is none."""
        if self.low is None or self.high is None:
            return None
        return f"{self._written(self.low)} to {self._written(self.high)}"

    @property
    def cut(self) -> str | None:
        """How many answers were cut off, for people; None where nothing was generated."""
        if self.n_cut_unknown:
            return "unknown" if self.n_cut is None else f"at least {self.n_cut}"
        return None if self.n_cut is None else f"{self.n_cut} ({self.n_cut / self.n:.1%})"

    def _written(self, value: float | None) -> str:
        if value is None:
            return "beyond 1e300"
        if self.kind == "mean":
            return f"{value:.1%}"
        return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


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

    settings: EvalSettings
    scores: tuple[Score, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    answers: Answers = field(default_factory=dict, compare=False, repr=False)
    """Not part of `to_dict()`."""
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
        if not judged and len(self.settings["variants"]) < 2:
            return f"{len(self.scores)} figures of one variant; nothing was compared."
        if not judged:
            return "No metric that a benchmark is judged by could be compared; see the notes."
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
            "neither."
        )

    def place(self, change: Change) -> str:
        """The task of a comparison, with the metric where the task is judged by several."""
        metrics = {one.metric for one in self.changes if one.primary and one.task == change.task}
        return change.task if len(metrics) < 2 else f"{change.task} {change.metric}"

    def flips(self, change: Change) -> Iterator[tuple[str, StoredAnswer, StoredAnswer]]:
        """The items on which a comparison's variants differ: (item, the base's answer, the other's)."""
        base, other = self.answers[change.task][change.base], self.answers[change.task][change.variant]
        for item in base:
            values = [answers[item]["scores"].get(change.metric) for answers in (base, other)]
            if None not in values and values[0] != values[1]:
                yield item, base[item], other[item]
