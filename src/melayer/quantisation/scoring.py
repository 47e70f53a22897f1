"""How well the evaluation sequences are predicted, whatever is at work on the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from melayer.data.rows import batches
from melayer.errors import InputError
from melayer.interventions.baked_prefix import BakedPrefix
from melayer.model.decoder import Decoder
from melayer.model.losses import losses
from melayer.quantisation.result import PerplexityScore
from melayer.quantisation.rounding import Rounding
from melayer.quantisation.sequences import CheckSequences
from melayer.runs.progress import Progress

_LARGEST_NLL = 700  # e^700 is about the largest number that there is


@dataclass(frozen=True, eq=False)
class Scorer:
    """Runs the evaluation sequences, again for every setting."""

    decoder: Decoder
    sequences: CheckSequences
    max_batch_tokens: int

    def score(
        self, progress: Progress | None, rounding: Rounding | None = None, baked: BakedPrefix | None = None
    ) -> PerplexityScore:
        """The losses of the tokens from the second behind the prefix on, whatever runs before them.

        Args:
            progress: Called with the tokens done and the tokens in all.
            rounding: What rounds the linear inputs, if they are rounded.
            baked: The prefix as keys and values, on which the rest of each sequence goes on.
        """
        rows, n_prefix = self.sequences.evaluation_rows, self.sequences.n_prefix
        by_sequence: dict[int, float] = {}
        done = 0
        for batch in batches(rows, max_batch_tokens=self.max_batch_tokens):
            run, cache = batch, None
            if baked is not None:
                cache = baked.rows(len(batch.rows))
                run = replace(batch, ids=batch.ids[:, n_prefix:], attention_mask=batch.attention_mask[:, n_prefix:])
            with nullcontext() if rounding is None else rounding.of(run):
                loss = losses(self.decoder, run, cache=cache).reshape(len(batch.rows), -1)
            predicted = loss if baked is not None else loss[:, n_prefix:]
            for row, value in zip(batch.rows, predicted.double().sum(dim=1).tolist(), strict=True):
                by_sequence[row.index] = value
            done += sum(batch.lengths)
            if progress is not None:
                progress(done, self.sequences.evaluation_tokens)
        return score_of([by_sequence[row.index] for row in rows], self.sequences.n_predicted)


def score_of(by_sequence: Sequence[float], n_predicted: int) -> PerplexityScore:
    """The score of sequences with these sums of log-losses over `n_predicted` tokens each."""
    finite = tuple(value if math.isfinite(value) else None for value in by_sequence)
    nll = sum(by_sequence) / (n_predicted * len(by_sequence))
    if not nll < _LARGEST_NLL:
        return PerplexityScore(None, None, finite)
    return PerplexityScore(nll, math.exp(nll), finite)


def require_finite(score: PerplexityScore) -> None:
    """Raises InputError where a loss of the unquantised model is not finite."""
    if any(value is None for value in score.by_sequence):
        raise InputError(
            "The texts cannot be predicted: the log-losses of the unquantised model are not finite. Load the "
            "model in a wider dtype, or see melayer locate."
        )
