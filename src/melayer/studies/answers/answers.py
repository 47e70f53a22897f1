"""What a model answers with and without a mask, to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from melayer.errors import InputError
from melayer.interventions.mask import WeMask
from melayer.model import hooks, wiring
from melayer.model.forward import input_device
from melayer.model.provenance import ModelInfo, describe
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Side = Literal["plain", "masked"]
Stream = Callable[[int, Side, str], None]
"""Called with the prompt's place, the side, and the piece of text that came."""


@dataclass(frozen=True)
class Answer:
    """One prompt and its two answers."""

    prompt: str
    n_prompt_tokens: int
    plain: str
    masked: str
    first_difference: int | None
    """The first generated token, from 0, that differs; None where the answers are the same."""


@dataclass(frozen=True)
class AnswersResult:
    """What `answers` found."""

    model: ModelInfo
    settings: dict[str, Any]
    mask: WeMask
    answers: tuple[Answer, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        same = sum(answer.first_difference is None for answer in self.answers)
        return f"The mask leaves {same} of {len(self.answers)} answers as they are."


def answers(
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
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise InputError("There is no prompt, or an empty one. Give text to answer.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    if temperature < 0:
        raise InputError(f"temperature is {temperature}; expected 0 or more.")
    templated = bool(tokenizer.chat_template) if chat is None else chat
    if (templated or system is not None) and not tokenizer.chat_template:
        raise InputError("This tokenizer has no chat template. Leave chat and the system prompt out.")
    if system is not None and not templated:
        raise InputError("A system prompt was given, but the prompt is not put into the chat template. Allow it.")
    decoder = wiring.read(model)
    rows = [_ids(tokenizer, prompt, templated, system) for prompt in prompts]
    longest = max(map(len, rows)) + max_new_tokens
    if decoder.max_positions is not None and longest > decoder.max_positions:
        raise InputError(
            f"The longest prompt has {max(map(len, rows))} tokens and {max_new_tokens} new ones were asked for, but "
            f"the model has {decoder.max_positions} positions. Give a shorter prompt or fewer new tokens."
        )
    found = []
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids: dict[Side, list[int]] = {}
        sides: tuple[Side, ...] = ("plain", "masked")
        for side in sides:
            streamer = None if stream is None else _Pieces(tokenizer, place, side, stream)
            with hooks.measuring(model), mask.apply(model) if side == "masked" else nullcontext():
                ids[side] = _generate(model, tokenizer, row, max_new_tokens, temperature, seed, streamer)
        plain, masked = (str(tokenizer.decode(ids[side], skip_special_tokens=True)) for side in sides)
        found.append(Answer(prompt, len(row), plain, masked, _difference(ids["plain"], ids["masked"])))
    return AnswersResult(
        model=describe(decoder, name),
        settings={
            "max_new_tokens": max_new_tokens,
            "chat": templated,
            "system": system,
            "temperature": temperature,
            "seed": seed,
            "layers_counted_from": 0,
        },
        mask=mask,
        answers=tuple(found),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str, templated: bool, system: str | None) -> list[int]:
    if not templated:
        return list(tokenizer(prompt)["input_ids"])
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    streamer: Any,
) -> list[int]:
    ids = torch.tensor([row], device=input_device(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"do_sample": bool(temperature), "temperature": temperature or None}
    if not temperature:
        # A checkpoint's own sampling options would be complained about where nothing is drawn.
        sampling |= {"top_p": None, "top_k": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generate: Any = model.generate  # whose type PreTrainedModel does not have
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
        )
    return list(out[0, len(row) :].tolist())


def _difference(left: list[int], right: list[int]) -> int | None:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


class _Pieces:
    """What `generate` calls a streamer: hands on the text that each new token adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, place: int, side: Side, stream: Stream) -> None:
        self.tokenizer, self.place, self.side, self.stream = tokenizer, place, side, stream
        self.ids: list[int] = []
        self.shown = ""
        self.prompted = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then each new token."""
        if not self.prompted:
            self.prompted = True
            return
        self.ids += value.flatten().tolist()
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        # A character of several tokens is a replacement character until it is whole.
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """The last pieces."""
        self._show(str(self.tokenizer.decode(self.ids, skip_special_tokens=True)))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.stream(self.place, self.side, text[len(self.shown) :])
            self.shown = text
