"""Whether a generated answer ended by itself, or because it was not allowed to be longer."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

CUT_SHARE = 0.05
"""From this share of answers cut off on it is said beside the score: one that is cut off is nearly always counted as
wrong, so that a score can be off by as much, and a difference of 5 points is what a few hundred items show."""


@contextmanager
def watched(lm: Any) -> Iterator[dict[str, deque[bool]]]:
    """For each prompt whether its answers were cut off, in the order of the requests; filled while lm-eval answers.

    lm-eval hands out texts alone, from which it cannot be told. Here each row is seen as it was generated: an answer
    is cut off if it has as many tokens as it may, and neither a token that ends it nor a stop string among them.

    Args:
        lm: lm-eval's model class around a model.
    """
    by_prompt: dict[str, deque[bool]] = defaultdict(deque)
    waiting: deque[bool] = deque()
    generate, hook = lm._model_generate, lm.cache_hook
    config = lm.model.generation_config
    ends = end_tokens(config.eos_token_id, lm.eot_token_id)
    kept = config.max_new_tokens

    def watching(context: Any, max_length: int, stop: Sequence[str], **options: Any) -> Any:
        out = generate(context=context, max_length=max_length, stop=stop, **options)
        limit = max_length - context.shape[1]
        waiting.extend(_cut(lm, row, limit, stop, ends) for row in out[:, context.shape[1] :].tolist())
        return out

    lm._model_generate = watching
    lm.set_cache_hook(_Hook(by_prompt, waiting))
    config.max_new_tokens = None  # a checkpoint's own limit would stand in for the task's
    try:
        yield by_prompt
    finally:
        del lm._model_generate
        lm.set_cache_hook(hook)
        config.max_new_tokens = kept


class _Hook:
    """What lm-eval tells of each answer as it is made, in its own order."""

    def __init__(self, by_prompt: dict[str, deque[bool]], waiting: deque[bool]) -> None:
        self.by_prompt, self.waiting = by_prompt, waiting

    def add_partial(self, kind: str, request: tuple[str, Any], answer: Any) -> None:
        """Called by lm-eval, once for each answer."""
        if kind == "generate_until":
            self.by_prompt[request[0]].append(self.waiting.popleft())


def end_tokens(*ids: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end an answer, of what a configuration calls `eos_token_id`: one, several or none."""
    each = (() if one is None else [one] if isinstance(one, int) else one for one in ids)
    return frozenset(token for tokens in each for token in tokens)


def _cut(lm: Any, row: Sequence[int], limit: int, stop: Sequence[str], ends: frozenset[int]) -> bool:
    """Of one row as it was generated, padding behind its end included."""
    if len(row) < limit or not ends.isdisjoint(row):
        return False
    texts = [lm.tok_decode(row, skip_special_tokens=special) for special in (False, True)]
    return not any(term and term in text for term in stop for text in texts)
