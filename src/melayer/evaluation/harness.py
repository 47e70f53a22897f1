"""The items of a benchmark, answered in lm-eval's own batches and scored by lm-eval's own rules."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from melayer.data.tokens import Affixes, Ids
from melayer.errors import InputError, require_known
from melayer.evaluation.settings import MetricSettings
from melayer.evaluation.tasks import FEWSHOT_SEED, Benchmark, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_METHODS = {
    "generate_until": "generate_until",
    "multiple_choice": "loglikelihood",
    "loglikelihood": "loglikelihood",
    "loglikelihood_rolling": "loglikelihood_rolling",
}
_RATIOS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True, eq=False)
class Item:
    """One question."""

    key: str
    """`task/place`, the place being that in the benchmark's own order."""
    task: Any
    requests: tuple[Any, ...]
    """lm-eval's instances: one, or one for each choice."""
    prompt: str
    prompt_hash: str
    """Sixteen hexadecimal digits of the sha256 of all that is asked, choices and settings of generation included."""


@dataclass(frozen=True)
class Response:
    """What one variant said to one item, as `StoredAnswer` holds it."""

    item: str
    prompt: str
    output: Any
    scores: dict[str, Any]
    tokens: int


@contextmanager
def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int | None,
    bos: bool | None = None,
) -> Iterator[Any]:
    """lm-eval's model class around this very model, so that hooks fire; the model's mode is put back afterwards.

    Args:
        model: The model.
        tokenizer: The model's.
        batch_size: Items answered at once.
        max_length: Tokens of prompt and answer at most.
        bos: What the likelihood of a whole text begins with, see `rolling_beginning`.
    """
    from lm_eval import utils
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]
        """Without the bars that lm-eval draws for each batch of long texts, whatever it is told."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """The log-likelihood of whole texts, each from its own first token on.

            lm-eval's own puts BOS (or the end of text) in front, also where the tokenizer does not, which takes away
            the massive token of some models, and where it does, so that it is there twice.
            """
            windows = []
            for place, request in enumerate(requests):
                ids = list(beginning.of_text(request.args[0]).ids)
                rolling = utils.get_rolling_token_windows(ids[1:], ids[0], self.max_length, 1) if ids else ()
                windows += [(place, (None, *utils.make_disjoint_window(window))) for window in rolling]
            totals = [0.0] * len(requests)
            for start in range(0, len(windows), int(self.batch_size)):
                places, batch = zip(*windows[start : start + int(self.batch_size)], strict=True)
                scored = self._loglikelihood_tokens(list(batch), override_bs=len(batch))
                for place, (nll, _) in zip(places, scored, strict=True):
                    totals[place] += nll
            return totals

    beginning = Ids.of(tokenizer, bos)
    training = model.training
    try:
        with quiet():
            lm = Quiet(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it sets padding on the one that it is given
                batch_size=batch_size,
                max_length=max_length,
                # In bfloat16 it would add up log-likelihoods of thousands in steps of 16.
                softmax_dtype="float32",
            )
        yield lm
    finally:
        model.train(training)


def rolling_beginning(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> str:
    """What the likelihood of a whole text begins with, in words: for the settings, since figures depend on it."""
    adds = bos if bos is not None else Affixes.of(tokenizer).adds_bos(tokenizer)
    return f"BOS ({tokenizer.bos_token})" if adds else "the text's first token, which is not predicted"


def items_of(benchmark: Benchmark, lm: Any, *, chat: bool, system: str | None, limit: int | None) -> list[Item]:
    """The benchmark's questions in its own order, as lm-eval asks them.

    Args:
        benchmark: What to ask.
        lm: What `harness` gives.
        chat: Whether to use the chat template, with solved examples as turns of their own.
        system: A system prompt.
        limit: Take only the first of each task.

    Raises:
        InputError: A task asks in a way that is not supported, or for longer answers than the model has room for.
    """
    found = []
    for name, task in benchmark.tasks.items():
        require_known(task.OUTPUT_TYPE, _METHODS, f"The task {name} asks by {task.OUTPUT_TYPE}")
        if task.OUTPUT_TYPE == "generate_until":
            longest = int(task.config.generation_kwargs["max_gen_toks"])
            if longest >= lm.max_length:
                raise InputError(
                    f"Answers to {name} may have {longest} tokens, and the model has room for {lm.max_length} with the "
                    "prompt. Give --max-new-tokens (load_tasks(max_new_tokens=...)), and say so beside the figures."
                )
        # Each time anew: the task goes on drawing solved examples where it stopped.
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        task.build_all_requests(
            limit=limit,
            system_instruction=system,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=lm.apply_chat_template if chat else None,
            tokenizer_name=lm.tokenizer_name if chat else "",
        )
        by_place: dict[int, list[Any]] = {}
        for request in task.instances:
            by_place.setdefault(request.doc_id, []).append(request)
        for place, requests in by_place.items():
            asked = repr([request.args for request in requests])
            digest = hashlib.sha256(asked.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
            prompt = str(requests[0].args[0])
            found.append(Item(f"{name}/{place}", task, tuple(requests), prompt, digest))
    return found


def item_batches(items: Sequence[Item], lm: Any) -> list[list[Item]]:
    """Batches of items of about the same length, longest first, in the order that lm-eval itself would take."""

    def order(item: Item) -> tuple[Any, ...]:
        request = item.requests[0]
        if request.request_type == "loglikelihood":
            context, continuation = lm._encode_pair(*request.args)
            # A choice of one token costs no place: lm-eval reads it off where the context ends.
            tokens = context + continuation
            return (-len(tokens), tuple(tokens))
        if request.request_type == "loglikelihood_rolling":
            return ()
        return (-len(lm.tok_encode(request.args[0])), request.args[0])

    groups: dict[str, list[Item]] = {}
    for item in items:
        request = item.requests[0]
        kind = repr(request.args[1]) if request.request_type == "generate_until" else request.request_type
        groups.setdefault(kind, []).append(item)
    size = int(lm.batch_size)
    made = []
    for group in groups.values():
        ordered = sorted(group, key=order)
        made += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return made


def answer(batch: Sequence[Item], lm: Any) -> list[Response]:
    """One batch answered by the model as it is now, and scored."""
    kind = batch[0].requests[0].request_type
    requests = [request for item in batch for request in item.requests]
    outputs = iter(getattr(lm, _METHODS[kind])([copy.copy(request) for request in requests], disable_tqdm=True))
    found = []
    for item in batch:
        said = [next(outputs) for _ in item.requests]
        output = said[0] if len(said) == 1 else said
        if kind == "generate_until":
            tokens = len(lm.tok_encode(output))
        elif kind == "loglikelihood":
            tokens = sum(len(lm._encode_pair(*request.args)[1]) for request in item.requests)
        else:
            tokens = len(lm.tok_encode(item.requests[0].args[0]))
        found.append(Response(item.key, item.prompt_hash, output, score(item, said), tokens))
    return found


def score(item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
    """What lm-eval's filters and metrics make of the outputs to an item's requests."""
    requests = [copy.copy(request) for request in item.requests]
    for request, output in zip(requests, outputs, strict=True):
        request.resps, request.filtered_resps = [output], {}
    task = copy.copy(item.task)
    task._instances = requests
    task.apply_filters()
    several = len(requests[0].filtered_resps) > 1
    found = {}
    for name in requests[0].filtered_resps:
        values = task.process_results(requests[0].doc, [request.filtered_resps[name] for request in requests])
        for metric, value in values.items():
            found[f"{metric},{name}" if several else metric] = _value_and_size(task, metric, value)
    return found


def metrics_of(benchmark: Benchmark) -> dict[str, MetricSettings]:
    """For each metric its kind (`mean`, one of the ratios of log-likelihoods, or `other`), direction and weight."""
    found: dict[str, MetricSettings] = {}
    for task in benchmark.tasks.values():
        filters = [item.name for item in task._filters]
        for metric, better in task.higher_is_better().items():
            for name in [f"{metric},{part}" for part in filters] if len(filters) > 1 else [metric]:
                found[name] = {
                    "kind": _kind(task, metric),
                    "higher_is_better": bool(better),
                    "primary": not benchmark.primary or name in benchmark.primary,
                }
    return found


def _kind(task: Any, metric: str) -> str:
    if task.OUTPUT_TYPE == "loglikelihood_rolling" and metric in _RATIOS:
        return metric
    averaging = getattr(task.aggregation().get(metric), "__name__", "")
    return "mean" if averaging in ("mean", "agg_inst_level_acc") else "other"


def _value_and_size(task: Any, metric: str, value: Any) -> Any:
    kind = _kind(task, metric)
    if kind == "mean":
        parts = [float(part) for part in value] if isinstance(value, list | tuple) else [float(value)]
        pair = (math.fsum(parts), float(len(parts)))
    elif kind in _RATIOS:
        pair = (float(value[0]), float(value[1]))
    else:
        return value
    if not all(map(math.isfinite, pair)):
        raise InputError(
            f"{task.config.task} gave {pair[0]} for {metric}: the model's output is not finite. Try --dtype float32."
        )
    return pair
