"""What one quantisation check runs, and under what."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.model.decoder import Decoder
from melayer.model.subject import Subject
from melayer.quantisation.linear_inputs import LinearInput
from melayer.quantisation.sequences import CheckSequences
from melayer.runs.progress import Bar


@dataclass(frozen=True, eq=False)
class Check:
    """The model, what is rounded of it, the sequences, and how they are run."""

    subject: Subject
    linear_inputs: tuple[LinearInput, ...]
    sequences: CheckSequences
    criterion: Criterion
    max_batch_tokens: int
    bar: Bar
    """Over all passes."""

    @property
    def decoder(self) -> Decoder:
        """The model's parts."""
        return self.subject.decoder

    def under(self, mask: WeMask | None) -> AbstractContextManager[None]:
        """The mask, if there is one, is at work on the model inside the context."""
        return nullcontext() if mask is None else mask.apply(self.decoder)
