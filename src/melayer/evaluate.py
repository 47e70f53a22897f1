"""Does relaxing the massive token help? Every item answered by every variant, compared in pairs, and kept."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from melayer import architecture, paired
from melayer.answer_store import Store, file_of, order_of
from melayer.answering import answer, batches, harness, items_of, metrics_of
from melayer.errors import InputError
from melayer.hooks import measuring
from melayer.paired import Comparison
from melayer.processes import Group
from melayer.provenance import describe, versions
from melayer.tasks import FEWSHOT_SEED, Benchmark
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16
Progress = Callable[[int, int], None]


class Variant(Protocol):
    """A mask or one of its comparators."""

    def apply(self, model: PreTrainedModel, *, parts: Mapping[str, str] | None = None) -> AbstractContextManager[None]:
        """The model under it."""


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


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    variants: Mapping[str, Variant | None],
    *,
    chat: bool | None = None,
    system: str | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Every item answered by every variant from one loaded model; the first variant is what the others are held to.

    Under `accelerate launch` or `torchrun` whole batches are dealt to the processes, and every one returns the same
    result.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        benchmarks: What `load_tasks` gives.
        variants: By label: a mask, a comparator, or None for the model as it is.
        chat: Ask through the chat template; by default where there is one.
        system: A system prompt, for the chat template.
        limit: Only the first items of each task.
        batch_size: Items answered at once.
        max_length: Tokens of prompt and answer at most; by default the model's positions.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model; by default what it was loaded from.
        store: A directory in which every answer is kept as it is given; a run that was stopped goes on from there.
        progress: Called with (answers given, answers in all).

    Raises:
        InputError: There is no chat template, or the store is of other settings.
        OutputError: The store cannot be written.

    Example:
        >>> evaluate(model, tokenizer, load_tasks(["gsm8k"]), {"plain": None, "mask": mask})  # doctest: +SKIP
    """
    if not variants or not benchmarks:
        raise InputError("Nothing to evaluate: give at least one benchmark and one variant.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError("The model's tokenizer has no chat template. Leave --chat out, or give a chat model.")
    if system is not None and chat is False:
        raise InputError("A system prompt needs the chat template. Leave --no-chat out, or the system prompt.")
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    if system is not None and not chat:
        raise InputError("A system prompt needs a chat template, and the model's tokenizer has none.")
    decoder = architecture.read(model, parts=parts)
    asked = {
        "chat": chat,
        "system": system,
        "batch_size": batch_size,
        "max_length": max_length,
        "model": describe(decoder, name).to_dict(),
        "device": model.device.type,
        "versions": versions() | {"lm_eval": version("lm_eval")},
    }
    settings = {
        "shared": asked,
        "tasks": {benchmark.name: _described(benchmark, limit) for benchmark in benchmarks},
        "variants": {label: _variant(variant) for label, variant in variants.items()},
    }
    group = Group.joined(model.device.type)
    kept = Store.opened(None if store is None else Path(store), settings, group)
    with harness(model, tokenizer, batch_size=batch_size, max_length=max_length) as lm, measuring(model):
        items = {
            benchmark.name: items_of(benchmark, lm, chat=chat, system=system, limit=limit) for benchmark in benchmarks
        }
        kept.check(items)
        work = [(task, batch) for task, found in items.items() for batch in batches(found, lm)]
        pairs = [(label, variant) for label, variant in variants.items()]
        missing = [
            (task, batch, pair)
            for (task, batch), pair in itertools.product(work, pairs)
            if not all((task, pair[0], item.key) in kept.records for item in batch)
        ]
        total = sum(len(found) for found in items.values()) * len(pairs)
        done = total - sum(len(batch) for _, batch, _ in missing)
        for place, (task, batch, (label, variant)) in enumerate(missing):
            if place % group.size == group.rank:
                started = time.perf_counter()
                with ExitStack() as stack:
                    if variant is not None:
                        stack.enter_context(variant.apply(model, parts=parts))
                    found = answer(batch, lm)
                seconds = (time.perf_counter() - started) / len(batch)
                kept.add({"task": task, "variant": label, **asdict(replace(one, seconds=seconds))} for one in found)
            done += len(batch)
            if progress is not None:
                progress(done, total)
    kept.finish(items, list(variants))
    aggregates = {
        (benchmark.name, metric): (lambda values, b=benchmark, m=metric: _aggregate(b, m, values))
        for benchmark in benchmarks
        for metric in settings["tasks"][benchmark.name]["metrics"]
    }
    prompts = {item.prompt_hash: item.prompt for found in items.values() for item in found}
    answers = {
        task: {label: {item.key: kept.records[task, label, item.key] for item in found} for label in variants}
        for task, found in items.items()
    }
    return _result(settings, answers, prompts, aggregates)


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
    kept: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for task, by_variant in result.answers.items():
        first, second = split(task, list(by_variant[base]), on, report_on, allow_same_items)
        shared = set(first) & set(second)
        kept[task] = {label: {key: answers[key] for key in second} for label, answers in by_variant.items()}
        others = [label for label in by_variant if label != base]
        for metric, about in tasks[task]["metrics"].items():
            if not about["primary"] or about["kind"] == "other" or not others:
                continue
            values = {label: _value(about["kind"], _pairs(by_variant[label], first, metric)) for label in others}
            rising = about["higher_is_better"]
            best = max(others, key=lambda label: values[label] if rising else -values[label])
            change = _change(task, metric, about, base, best, kept[task])
            if change is not None:
                chosen.append(Chosen(task, metric, best, len(first), values[best], bool(shared), change))
    adjusted = paired.holm([one.change.comparison for one in chosen])
    chosen = [replace(one, change=replace(one.change, comparison=c)) for one, c in zip(chosen, adjusted, strict=True)]
    found = _result(result.settings, kept, result.prompts, {})
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
    answers: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    variants: dict[str, Any] = {}
    notes = []
    for task in tasks:
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, (settings, records) in zip(names, runs, strict=True):
            for label, about in settings["variants"].items():
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
    settings = {"shared": {"runs": {name: run[0]["shared"] for name, run in zip(names, runs, strict=True)}}}
    settings |= {"tasks": {task: tasks[task] for task in answers}, "variants": variants}
    result = _result(settings, answers, {}, {})
    return replace(result, notes=(*result.notes, *notes))


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


def _aggregate(benchmark: Benchmark, metric: str, values: list[Any]) -> float:
    task = next(iter(benchmark.tasks.values()))
    return float(task.aggregation()[metric.partition(",")[0]](values))


def _described(benchmark: Benchmark, limit: int | None) -> dict[str, Any]:
    tasks = benchmark.tasks
    first = next(iter(tasks.values()))
    return {
        "lm_eval_tasks": {name: str(task.VERSION) for name, task in tasks.items()},
        "fewshot": first.config.num_fewshot or 0,
        "fewshot_seed": FEWSHOT_SEED,
        "generation": first.config.generation_kwargs if first.OUTPUT_TYPE == "generate_until" else None,
        "limit": limit,
        "data_sha256": dict(benchmark.data),
        "cite": benchmark.cite,
        "metrics": metrics_of(benchmark),
    }


def _variant(variant: Variant | None) -> Any:
    if variant is None:
        return None
    return variant.to_dict() if hasattr(variant, "to_dict") else asdict(variant)  # type: ignore[call-overload]


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
