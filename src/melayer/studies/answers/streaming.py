"""Answers as they come, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from melayer.studies.answers.result import Side

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stream = Callable[[int, Side, str], None]
"""Called with the prompt's place, the side, and the piece of text that came."""


class TextPieces:
    """What `generate` calls a streamer: hands on the text that each new token adds."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int, side: Side, stream: Stream) -> None:
        """The streamer of one side's answer to the prompt at this place."""
        self.tokenizer, self.prompt, self.side, self.stream = tokenizer, prompt, side, stream
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
            self.stream(self.prompt, self.side, text[len(self.shown) :])
            self.shown = text
