"""Does relaxing the massive token help? Every item answered by every variant, compared in pairs, and kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from melayer.errors import InputError
from melayer.evaluation.harness import (
    Asked,
    Item,
    answer,
    harness,
    item_batches,
    items_of,
    metrics_of,
    rolling_beginning,
)
from melayer.evaluation.hub_code import hub_code
from melayer.evaluation.result import EvalResult, StoredAnswer
from melayer.evaluation.scoring import Aggregates, scored
from melayer.evaluation.settings import EvalSettings, SharedSettings, TaskSettings
from melayer.evaluation.store import Store
from melayer.evaluation.tasks import FEWSHOT_SEED, Benchmark
from melayer.model.hooks import measuring
from melayer.model.provenance import versions
from melayer.model.subject import Subject
from melayer.runs.processes import Group
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from melayer.model.decoder import Decoder

BATCH_SIZE = 16


class Variant(Protocol):
    """A mask or one of its comparators."""

    def apply(
        self, model: PreTrainedModel | Decoder, *, parts: Mapping[str, str] | None = None
    ) -> AbstractContextManager[None]:
        """The model under it."""


def evaluate(  # noqa: PLR0913 - public: all that decides what is asked, and how
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
    bos: bool | None = None,
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
        bos: Whether the begin-of-sequence token comes before a text whose likelihood is asked as a whole (`wikitext2`);
            None leaves it to the tokenizer.
        parts: Names of parts that `wiring.read` does not find by itself.
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
    chat = _asks_by_template(tokenizer, chat, system)
    subject = Subject.of(model, tokenizer, parts=parts, name=name)
    group = Group.joined(model.device.type)
    with (
        hub_code(any(benchmark.trust_remote_code for benchmark in benchmarks)),
        harness(model, tokenizer, batch_size=batch_size, max_length=max_length, bos=bos) as lm,
        measuring(model),
    ):
        asked = {
            benchmark.name: items_of(benchmark, lm, chat=chat, system=system, limit=limit) for benchmark in benchmarks
        }
        items = {task: of.items for task, of in asked.items()}
        settings: EvalSettings = {
            "shared": _shared(subject, chat, system, batch_size, max_length),
            "tasks": {
                benchmark.name: _described(benchmark, limit, asked[benchmark.name], tokenizer, bos)
                for benchmark in benchmarks
            },
            "variants": {label: _variant(variant) for label, variant in variants.items()},
        }
        store_of_run = Store.opened(None if store is None else Path(store), settings, group, items)
        _answer_missing(_Questions(subject, lm, items, variants), store_of_run, progress)
    store_of_run.finish(items, list(variants))
    answers = {
        task: {label: {item.key: store_of_run.records[task, label, item.key] for item in found} for label in variants}
        for task, found in items.items()
    }
    prompts = {item.prompt_hash: item.prompt for found in items.values() for item in found}
    result = scored(settings, answers, prompts, _aggregates(benchmarks, settings))
    return replace(result, notes=(*(note for benchmark in benchmarks for note in benchmark.notes), *result.notes))


@dataclass(frozen=True, eq=False)
class _Questions:
    """What is asked of whom."""

    subject: Subject
    lm: Any
    """lm-eval's model class around the model."""
    items: Mapping[str, Sequence[Item]]
    """By benchmark."""
    variants: Mapping[str, Variant | None]


def _answer_missing(questions: _Questions, store: Store, progress: Progress | None) -> None:
    """Every batch that a variant has not answered yet, dealt to the processes; answers are kept as they come."""
    batches = [(task, batch) for task, found in questions.items.items() for batch in item_batches(found, questions.lm)]
    missing = [
        (task, batch, label)
        for (task, batch), label in itertools.product(batches, questions.variants)
        if not all((task, label, item.key) in store.records for item in batch)
    ]
    total = sum(len(found) for found in questions.items.values()) * len(questions.variants)
    done = total - sum(len(batch) for _, batch, _ in missing)
    for place, (task, batch, label) in enumerate(missing):
        if place % store.group.size == store.group.rank:
            store.add(_answers(questions, task, batch, label))
        done += len(batch)
        if progress is not None:
            progress(done, total)


def _answers(questions: _Questions, task: str, batch: Sequence[Item], label: str) -> list[StoredAnswer]:
    """A batch answered under a variant."""
    variant, started = questions.variants[label], time.perf_counter()
    with ExitStack() as stack:
        if variant is not None:
            stack.enter_context(variant.apply(questions.subject.decoder))
        responses = answer(batch, questions.lm)
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        StoredAnswer(
            task=task,
            variant=label,
            item=response.item,
            prompt=response.prompt,
            output=response.output,
            scores=response.scores,
            tokens=response.tokens,
            seconds=seconds,
            cut=response.cut,
            failed=response.failed,
        )
        for response in responses
    ]


def _asks_by_template(tokenizer: PreTrainedTokenizerBase, chat: bool | None, system: str | None) -> bool:
    """Whether to ask through the chat template; by default where there is one."""
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise InputError("The model's tokenizer has no chat template. Leave --chat out, or give a chat model.")
    if system is not None and chat is False:
        raise InputError("A system prompt needs the chat template. Leave --no-chat out, or the system prompt.")
    if system is not None and not template:
        raise InputError("A system prompt needs a chat template, and the model's tokenizer has none.")
    return template if chat is None else chat


def _shared(
    subject: Subject, chat: bool, system: str | None, batch_size: int, max_length: int | None
) -> SharedSettings:
    return {
        "chat": chat,
        "system": system,
        "batch_size": batch_size,
        "max_length": max_length,
        "model": subject.info.to_dict(),
        "device": subject.model.device.type,
        "versions": versions() | {"lm_eval": version("lm_eval")},
    }


def _aggregates(benchmarks: Sequence[Benchmark], settings: EvalSettings) -> Aggregates:
    """lm-eval's own functions from all items' values to a metric."""
    return {
        (benchmark.name, metric): partial(_aggregate, benchmark, metric)
        for benchmark in benchmarks
        for metric in settings["tasks"][benchmark.name]["metrics"]
    }


def _aggregate(benchmark: Benchmark, metric: str, values: list[Any]) -> float:
    task = next(iter(benchmark.tasks.values()))
    return float(task.aggregation()[metric.partition(",")[0]](values))


def _described(
    benchmark: Benchmark, limit: int | None, asked: Asked, tokenizer: PreTrainedTokenizerBase, bos: bool | None
) -> TaskSettings:
    tasks = benchmark.tasks
    first = next(iter(tasks.values()))
    described: TaskSettings = {
        "lm_eval_tasks": {name: str(task.VERSION) for name, task in tasks.items()},
        "fewshot": first.config.num_fewshot or 0,
        "fewshot_seed": FEWSHOT_SEED,
        "generation": first.config.generation_kwargs if first.OUTPUT_TYPE == "generate_until" else None,
        "limit": limit,
        "data_sha256": dict(benchmark.data),
        "cite": benchmark.cite,
        "metrics": metrics_of(benchmark),
        "left_out": dict(asked.left_out) or None,
        "prompts_cut": {item.key: item.n_lost for item in asked.items if item.n_lost} or None,
    }
    if first.OUTPUT_TYPE == "loglikelihood_rolling":
        described["begins_with"] = rolling_beginning(tokenizer, bos)
    return described


def _variant(variant: Variant | None) -> Any:
    if variant is None:
        return None
    return variant.to_dict() if hasattr(variant, "to_dict") else asdict(variant)  # type: ignore[call-overload]
