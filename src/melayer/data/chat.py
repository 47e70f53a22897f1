"""A conversation as the text that a tokenizer's chat template makes of it.

A template is a program that came with a checkpoint. transformers runs it where it can touch nothing, but lets it run as
long and take as much memory as it likes; so it runs once in a process of its own first, with limits.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from melayer.data.template_trial import ENDLESS
from melayer.errors import InputError, border

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]
"""With a role and a content."""

SECONDS, MEGABYTES, CHARACTERS = 10, 1024, 16 << 20
"""What a template may take for one conversation, beside what the conversation has; one takes milliseconds."""


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, add_generation_prompt: bool = False, **options: Any
) -> str:
    """The conversation under the tokenizer's chat template, as text.

    Args:
        tokenizer: One with a chat template.
        turns: The conversation.
        add_generation_prompt: Whether what begins an answer follows.
        options: What `apply_chat_template` takes beside.

    Raises:
        InputError: The tokenizer has no template; or this one refuses the conversation, fails, or takes too long or
            too much memory.
    """
    with rendering([str(turn.get("role")) for turn in turns]):
        text: Any = None
        try_template(tokenizer, turns, add_generation_prompt=add_generation_prompt)
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        if not isinstance(text, str):
            raise TypeError(f"it makes a {type(text).__name__} and no text")
    return text


@contextmanager
def rendering(roles: Sequence[str]) -> Iterator[None]:
    """Whatever a template raises inside becomes one sentence.

    Args:
        roles: Who speaks in the conversation.

    Raises:
        InputError: It raises.
    """
    todo = "Leave the chat template out: --no-chat (chat=False)."
    if "system" in roles:
        todo = "Leave the system prompt out, or the chat template: --no-chat (chat=False)."
    with border(f"The tokenizer's chat template cannot be used for turns of {', '.join(roles)}", todo):
        yield


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless the tokenizer has a chat template, which is a text, or some with names."""
    template: Any = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if not template:
        raise InputError("This tokenizer has no chat template. Leave chat and the system prompt out.")
    if not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"The tokenizer's chat template is no text but {str(template)[:60]!r}. Leave chat and the system prompt "
            "out."
        )


def try_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, add_generation_prompt: bool) -> None:
    """Renders a first conversation in a process of its own, with limits; once for each template.

    What the template raises there is not this function's concern: it will raise again.

    Raises:
        InputError: The tokenizer has no template; or this one takes too long, too much memory, or makes too much text.
    """
    require_template(tokenizer)
    asked = {
        "template": tokenizer.get_chat_template(),
        "turns": [dict(turn) for turn in turns],
        "add_generation_prompt": add_generation_prompt,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    _tried(tokenizer.get_chat_template(), _Once(json.dumps(asked)))


class _Once(str):
    """An argument that does not count where calls are remembered."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once)


@functools.lru_cache(maxsize=64)
def _tried(template: str, asked: _Once) -> None:
    """Raises as `try_template`; what has passed is remembered by the template alone."""
    # -P and no empty entry: what lies in the directory at hand is no module.
    places = os.pathsep.join(place for place in sys.path if place)
    done = None
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "melayer.data.template_trial", str(SECONDS), str(MEGABYTES), str(CHARACTERS)],
            input=str(asked),
            env={**os.environ, "PYTHONPATH": places},
            capture_output=True,
            text=True,
            timeout=6 * SECONDS,
            check=False,
        )
    # A negative code is a signal: out of time or memory. Any other failure is the trial's own, and no verdict.
    if done is None or done.returncode < 0 or done.returncode == ENDLESS:
        raise InputError(
            f"The tokenizer's chat template does not come to an end within {SECONDS} s and {MEGABYTES} MB, or makes "
            f"more than {CHARACTERS:,} characters. Leave the chat template out: --no-chat (chat=False)."
        )
