"""The items of a benchmark, answered in lm-eval's own batches and scored by lm-eval's own rules."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from melayer.data.chat import render
from melayer.data.tokens import Affixes, Ids
from melayer.errors import InputError, border, reason, require_known
from melayer.evaluation.cut_off import watched
from melayer.evaluation.faults import encoded_pair, fault, left_out_note, lost, unfit
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
    n_lost: int = 0
    """Tokens at the prompt's beginning for which the model has no room, so that lm-eval leaves them out."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The questions of a benchmark."""

    items: tuple[Item, ...]
    left_out: Mapping[str, str]
    """By key why an item cannot be asked or judged."""


@dataclass(frozen=True)
class Response:
    """What one variant said to one item, as `StoredAnswer` holds it."""

    item: str
    prompt: str
    output: Any
    scores: dict[str, Any]
    tokens: int
    cut: bool | None
    """Whether a generated answer ended because it was not allowed to be longer; None where nothing is generated."""
    failed: str | None
    """Why it has no scores, where it has none."""


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

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            """As lm-eval's, which drops the system prompt without a word where the template refuses it."""
            return render(
                self.tokenizer,
                chat_history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def tok_batch_encode(self, strings: Any, *given: Any, **options: Any) -> Any:
            """As lm-eval's, which looks at the first prompt alone to tell whether they bring BOS themselves."""
            bos = str(self.tokenizer.bos_token)
            brings = [text.startswith(bos) for text in strings] if adds_bos else [False]
            if any(brings) and not all(brings):
                strings = [text.removeprefix(bos) for text in strings]
            return super().tok_batch_encode(strings, *given, **options)

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
    adds_bos = Affixes.of(tokenizer).adds_bos(tokenizer)
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
                trust_remote_code=False,  # the model is loaded already, so that no code can be asked for
            )
        yield lm
    finally:
        model.train(training)


def rolling_beginning(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> str:
    """What the likelihood of a whole text begins with, in words: for the settings, since figures depend on it."""
    adds = bos if bos is not None else Affixes.of(tokenizer).adds_bos(tokenizer)
    return f"BOS ({tokenizer.bos_token})" if adds else "the text's first token, which is not predicted"


def items_of(benchmark: Benchmark, lm: Any, *, chat: bool, system: str | None, limit: int | None) -> Asked:
    """The benchmark's questions in its own order, as lm-eval asks them.

    Args:
        benchmark: What to ask.
        lm: What `harness` gives.
        chat: Whether to use the chat template, with solved examples as turns of their own.
        system: A system prompt.
        limit: Take only the first of each task.

    Raises:
        InputError: A task asks in a way that is not supported, or for longer answers than the model has room for, or
            none of its items can be asked.
    """
    found: list[Item] = []
    left_out = dict(benchmark.unread)
    for name, task in benchmark.tasks.items():
        _require_askable(name, task, lm)
        # Each time anew: the task goes on drawing solved examples where it stopped.
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        options = {
            "apply_chat_template": chat,
            "chat_template": lm.apply_chat_template if chat else None,
        }
        for place, doc in zip(range(limit or len(task.eval_docs)), task.eval_docs, strict=False):
            key = f"{name}/{place}"
            requests: list[Any] = []
            try:
                why = fault(task, doc, benchmark.fields)
                if why is None:
                    requests = _requests(task, place, doc, system, options)
                    why = unfit(lm, requests) if requests else "it asks nothing"
            except Exception as error:  # noqa: BLE001 - whatever a task's own code raises over a row
                why = reason(error)
            if why is None:
                found.append(_item(key, task, requests, lm))
            else:
                left_out[key] = why
    if not found:
        raise InputError(
            left_out_note(benchmark.name, left_out, len(left_out), "cannot be asked or judged")
            + " Give other items, or another task."
        )
    return Asked(tuple(found), left_out)


def _require_askable(name: str, task: Any, lm: Any) -> None:
    """Raises InputError where the whole task cannot be asked as it is meant."""
    require_known(task.OUTPUT_TYPE, _METHODS, f"The task {name} asks by {task.OUTPUT_TYPE}")
    if (task.config.repeats or 1) > 1:
        raise InputError(
            f"The task {name} asks each question {task.config.repeats} times and votes, which is not supported. "
            "Give another task."
        )
    if task.OUTPUT_TYPE == "generate_until":
        longest = int(task.config.generation_kwargs["max_gen_toks"])
        if longest >= lm.max_length:
            raise InputError(
                f"Answers to {name} may have {longest} tokens, and the model has room for {lm.max_length} with the "
                "prompt. Give --max-new-tokens (load_tasks(max_new_tokens=...)), and say so beside the figures."
            )


def _requests(task: Any, place: int, doc: Any, system: str | None, options: Mapping[str, Any]) -> list[Any]:
    """What lm-eval asks about one row, as its `build_all_requests` does for all of them."""
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        system_instruction=system,
        fewshot_as_multiturn=options["apply_chat_template"],
        gen_prefix=task.doc_to_prefix(doc),
        **options,
    )
    metadata = (task.config.task, place, task.config.repeats)
    made = task.construct_requests(doc=doc, ctx=context, metadata=metadata, **options)
    return list(made) if isinstance(made, list) else [made]


def _item(key: str, task: Any, requests: Sequence[Any], lm: Any) -> Item:
    asked = repr([request.args for request in requests])
    digest = hashlib.sha256(asked.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
    return Item(key, task, tuple(requests), str(requests[0].args[0]), digest, lost(lm, requests))


def item_batches(items: Sequence[Item], lm: Any) -> list[list[Item]]:
    """Batches of items of about the same length, longest first, in the order that lm-eval itself would take."""

    def order(item: Item) -> tuple[Any, ...]:
        request = item.requests[0]
        if request.request_type == "loglikelihood":
            context, continuation = encoded_pair(lm, *request.args)
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
    """One batch answered by the model as it is now, and scored.

    Raises:
        InputError: The model cannot answer.
    """
    kind = batch[0].requests[0].request_type
    requests = [copy.copy(request) for item in batch for request in item.requests]
    todo = "Give a smaller --batch-size or --max-length, or another dtype; with --out what was answered is kept."
    with ExitStack() as stack:
        stack.enter_context(border(f"The batch of {batch[0].key} cannot be answered", todo))
        cut = stack.enter_context(watched(lm)) if kind == "generate_until" else {}
        outputs = iter(getattr(lm, _METHODS[kind])(requests, disable_tqdm=True))
        return [_response(item, [next(outputs) for _ in item.requests], kind, lm, cut) for item in batch]


def _response(item: Item, said: list[Any], kind: str, lm: Any, cut: Mapping[str, deque[bool]]) -> Response:
    output = said[0] if len(said) == 1 else said
    cut_off, failed = None, None
    if kind == "generate_until":
        tokens = len(lm.tok_encode(output))
        cut_off = cut[item.requests[0].args[0]].popleft()
    elif kind == "loglikelihood":
        tokens = sum(len(encoded_pair(lm, *request.args)[1]) for request in item.requests)
    else:
        tokens = len(lm.tok_encode(item.requests[0].args[0]))
    scores: dict[str, Any] = {}
    if kind != "generate_until" and not all(map(math.isfinite, _log_likelihoods(said))):
        # lm-eval would take it for the largest, or for the mean of all.
        output, failed = None, "the log-likelihood is not finite"
    else:
        try:
            scores = score(item, said)
        except Exception as error:  # noqa: BLE001 - whatever a task's own code raises over an answer
            failed = reason(error)
    return Response(item.key, item.prompt_hash, output, scores, tokens, cut_off, failed)


def _log_likelihoods(outputs: Sequence[Any]) -> list[float]:
    return [float(output[0] if isinstance(output, tuple | list) else output) for output in outputs]


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
        raise ValueError(f"{metric} is {pair[0]:g}")
    return pair
