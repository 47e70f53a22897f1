"""What a measurement is made on: a model with its tokenizer, read once and handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from melayer.data.rows import Row, encode, windows
from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.model import wiring
from melayer.model.decoder import Decoder, plain_model
from melayer.model.provenance import ModelInfo, describe
from melayer.model.token_ids import require_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Subject:
    """A model's parts, its tokenizer, and what results say of it.

    Each public function makes one from the plain model that it is given, and hands it to every measurement that it
    is made of, so that the architecture is read once. What takes a model or its parts (`WeMask.apply`, a comparator,
    a baked prefix) is given `decoder`, for the same reason.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        parts: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> Subject:
        """Reads the model.

        Args:
            model: A causal language model from transformers, also wrapped (PEFT), with its weights in place; or its
                parts, where they were read before.
            tokenizer: The model's.
            parts: Names of parts that `wiring.read` does not find by itself.
            name: What to call the model in results; by default what it was loaded from.

        Raises:
            ArchitectureError: A part of the model was not found.
            InputError: Autocast is on.
        """
        _refuse_autocast(plain_model(model))
        decoder = wiring.read(model, parts=parts)
        return cls(decoder, tokenizer, describe(decoder, name))

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        return self.decoder.model

    def rows(
        self, texts: Sequence[str] | None, *, max_tokens: int | None = None, bos: bool | None = None
    ) -> tuple[Row, ...]:
        """The token rows of `texts`, by default the built-in ones; see `encode`.

        Raises:
            InputError: As `encode`; or a token is beyond the embedding.
        """
        return self._known(
            encode(
                self.tokenizer,
                builtin_texts() if texts is None else texts,
                max_tokens=max_tokens,
                max_positions=self.decoder.max_positions,
                bos=bos,
            )
        )

    def windows(self, texts: Sequence[str] | None, length: int, *, bos: bool | None = None) -> tuple[Row, ...]:
        """The texts, by default the built-in ones, cut into sequences of `length` tokens; see `data.rows.windows`.

        Raises:
            InputError: As `windows`; or a token is beyond the embedding.
        """
        return self._known(
            windows(
                self.tokenizer,
                builtin_texts() if texts is None else texts,
                length,
                max_positions=self.decoder.max_positions,
                bos=bos,
            )
        )

    def _known(self, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        """The rows, whose tokens the embedding knows: said before anything runs."""
        for row in rows:
            require_rows(torch.tensor(row.ids), self.decoder.embedding, self.model)
        return rows


def _refuse_autocast(model: nn.Module) -> None:
    """Raises InputError where the model would compute in another dtype than its own, which is what results name."""
    for kind in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
        if torch.is_autocast_enabled(kind):
            dtype = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
            raise InputError(
                f"Autocast is on: on {kind} the model would compute in {dtype}, and results would say otherwise. "
                f"Measure inside torch.autocast({kind!r}, enabled=False), or load the model with dtype={dtype!r}."
            )
