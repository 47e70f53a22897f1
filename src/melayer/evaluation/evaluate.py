"""Does relaxing the massive token help? Every item answered by every variant, compared in pairs, and kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from melayer.errors import InputError
from melayer.evaluation.harness import answer, batches, harness, items_of, metrics_of
from melayer.evaluation.result import EvalResult, _result
from melayer.evaluation.store import Store
from melayer.evaluation.tasks import FEWSHOT_SEED, Benchmark
from melayer.model import wiring
from melayer.model.hooks import measuring
from melayer.model.provenance import describe, versions
from melayer.runs.processes import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16
Progress = Callable[[int, int], None]


class Variant(Protocol):
    """A mask or one of its comparators."""

    def apply(self, model: PreTrainedModel, *, parts: Mapping[str, str] | None = None) -> AbstractContextManager[None]:
        """The model under it."""


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
    decoder = wiring.read(model, parts=parts)
    asked = {
        "chat": chat,
        "system": system,
        "batch_size": batch_size,
        "max_length": max_length,
        "model": describe(decoder, name).to_dict(),
        "device": model.device.type,
        "versions": versions() | {"lm_eval": version("lm_eval")},
    }
    settings: dict[str, Any] = {
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
