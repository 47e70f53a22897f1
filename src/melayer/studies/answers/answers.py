"""What a model answers with and without a mask, to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from melayer.data.chat import render, require_template
from melayer.data.tokens import Ids
from melayer.errors import InputError, border
from melayer.evaluation.cut_off import end_tokens
from melayer.interventions.mask import WeMask
from melayer.measurements.settings import LAYERS_COUNTED_FROM
from melayer.model import hooks
from melayer.model.forward import input_device
from melayer.model.subject import Subject
from melayer.model.token_ids import require_rows
from melayer.numerics.seeds import require_seed
from melayer.studies.answers.result import SIDES, AnswerPair, AnswersResult, Side
from melayer.studies.answers.streaming import Stream, TextPieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Decoding:
    """How answers are generated."""

    max_new_tokens: int
    temperature: float
    seed: int


def answers(  # noqa: PLR0913 - the options of the command, each by its name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    mask: WeMask,
    max_new_tokens: int = 128,
    chat: bool | None = None,
    system: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    name: str | None = None,
    stream: Stream | None = None,
) -> AnswersResult:
    """Each prompt's answer by the plain model and under the mask, one prompt at a time.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        prompts: What to ask.
        mask: What to apply.
        max_new_tokens: Tokens of an answer at most.
        chat: Whether a prompt is a user's turn under the chat template; None: where there is a template.
        system: A system prompt; needs the template.
        temperature: 0 takes the likeliest token; above, both sides draw with the same seed.
        seed: Of the draw.
        name: What to call the model in the result.
        stream: Called with each piece of text as it comes.

    Raises:
        InputError: There is no prompt, an option is out of range, the prompt and its answer do not fit the model,
            or the mask does not.

    Example:
        >>> melayer.answers(model, tokenizer, ["Hello!"], mask=mask).answers[0].masked  # doctest: +SKIP
    """
    _check_options(prompts, max_new_tokens, temperature)
    require_seed(seed)
    templated = _templated(tokenizer, chat, system)
    subject = Subject.of(model, tokenizer, name=name)
    rows = [prompt_ids(tokenizer, prompt, templated, system) for prompt in prompts]
    for row in rows:
        require_rows(torch.tensor(row), subject.decoder.embedding, subject.model)
    _check_length(subject, max(map(len, rows)), max_new_tokens)
    decoding = _Decoding(max_new_tokens, temperature, seed)
    pairs = []
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids: dict[Side, list[int]] = {}
        for side in SIDES:
            streamer = None if stream is None else TextPieces(tokenizer, place, side, stream)
            with hooks.measuring(model), mask.apply(subject.decoder) if side == "masked" else nullcontext():
                ids[side] = _generate(subject, row, decoding, streamer)
        plain, masked = (str(tokenizer.decode(ids[side], skip_special_tokens=True)) for side in SIDES)
        cut = (_cut(subject, ids[side], max_new_tokens) for side in SIDES)
        pairs.append(AnswerPair(prompt, len(row), plain, masked, first_difference(ids["plain"], ids["masked"]), *cut))
    return AnswersResult(
        model=subject.info,
        settings={
            "max_new_tokens": max_new_tokens,
            "chat": templated,
            "system": system,
            "temperature": temperature,
            "seed": seed,
            "layers_counted_from": LAYERS_COUNTED_FROM,
        },
        mask=mask,
        answers=tuple(pairs),
    )


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, templated: bool, system: str | None = None
) -> list[int]:
    """The tokens that an answer follows: of the prompt as it is, or of a user's turn with what begins the answer."""
    if not templated:
        with border(f"The prompt {prompt[:30]!r} cannot be tokenised", "Mend it."):
            return list(Ids.of(tokenizer, None).of_text(prompt).ids)
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": prompt})
    text = render(tokenizer, turns, add_generation_prompt=True)
    with border(f"The prompt {prompt[:30]!r} cannot be tokenised", "Mend it."):
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise InputError(f"The prompt {text[:30]!r} gives no tokens. Give one with text, or leave the template out.")
    return ids


def _cut(subject: Subject, ids: Sequence[int], max_new_tokens: int) -> bool:
    """Whether an answer has all the tokens that it may have, and the last one does not end it."""
    ends = end_tokens(subject.model.generation_config.eos_token_id)
    return len(ids) >= max_new_tokens and ids[-1] not in ends


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first place, from 0, at which two rows of tokens differ, or one of them has ended; None where they are
    the same.
    """
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def _check_options(prompts: Sequence[str], max_new_tokens: int, temperature: float) -> None:
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise InputError("There is no prompt, or an empty one. Give text to answer.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; expected 0 or more.")


def _templated(tokenizer: PreTrainedTokenizerBase, chat: bool | None, system: str | None) -> bool:
    """Whether prompts are put into the chat template."""
    templated = bool(tokenizer.chat_template) if chat is None else chat
    if templated or system is not None:
        require_template(tokenizer)
    if system is not None and not templated:
        raise InputError("A system prompt was given, but the prompt is not put into the chat template. Allow it.")
    return templated


def _check_length(subject: Subject, longest: int, max_new_tokens: int) -> None:
    most = subject.decoder.max_positions
    if most is not None and longest + max_new_tokens > most:
        raise InputError(
            f"The longest prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but "
            f"the model has {most} positions. Give a shorter prompt or fewer new tokens."
        )


def _generate(subject: Subject, row: list[int], decoding: _Decoding, streamer: TextPieces | None) -> list[int]:
    model, tokenizer = subject.model, subject.tokenizer
    ids = torch.tensor([row], device=input_device(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": bool(decoding.temperature), "temperature": decoding.temperature or None}
    if not decoding.temperature:
        # A checkpoint's own sampling options would be complained about where nothing is drawn.
        sampling |= {"top_p": None, "top_k": None}
    with torch.random.fork_rng():
        torch.manual_seed(decoding.seed)
        generate: Any = model.generate  # whose type PreTrainedModel does not have
        with border("The model cannot answer", "Look at its generation_config.json, or remove that file."):
            out = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=pad,
                streamer=streamer,
                **sampling,
            )
    return list(out[0, len(row) :].tolist())
