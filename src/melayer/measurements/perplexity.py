"""How well a model predicts texts: the mean negative log-likelihood of a token, and its exponential."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from melayer.data.rows import batches
from melayer.errors import InputError
from melayer.measurements.settings import WindowSettings, window_settings
from melayer.model.losses import losses
from melayer.model.provenance import ModelInfo
from melayer.model.subject import Subject
from melayer.numerics.finite import finite
from melayer.numerics.intervals import FEW, ratio_interval
from melayer.runs.progress import Progress
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` found."""

    model: ModelInfo
    settings: WindowSettings
    T: int
    n_sequences: int
    n_predicted: int
    """Tokens predicted: all but the first of each sequence."""
    nll: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    perplexity: float
    low: float | None
    high: float | None
    """Ends of the 95 % interval of the perplexity, by sequence; None with a single sequence."""
    by_sequence: tuple[float, ...] = field(repr=False)
    """The sum over each sequence's predicted tokens, in nats."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        interval = "no interval from one sequence"
        if self.low is not None and self.high is not None:
            interval = f"95 % interval {self.low:,.2f} to {self.high:,.2f} by sequence"
            if self.n_sequences < FEW:
                interval += ", which is rough with so few"
        return (
            f"Over {self.n_sequences} sequences of T = {self.T} tokens the perplexity is {self.perplexity:,.2f} "
            f"({self.nll:.4f} nats a token, {self.n_predicted:,} tokens predicted; {interval})."
        )


def perplexity(  # noqa: PLR0913 - public: every option has a name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    T: int = 64,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """The perplexity of texts cut into sequences of T tokens, each predicted from its own beginning alone.

    It depends on T and on how the texts are cut: compare only figures of the same texts, T and tokenizer.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        T: Tokens in each sequence; all but the first are predicted.
        texts: What to predict; by default melayer's own.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Raises:
        InputError: T is beyond the texts or the model, or the logits are not finite.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.perplexity(model, tokenizer, T=256).perplexity  # doctest: +SKIP
    """
    return perplexity_on(
        Subject.of(model, tokenizer, parts=parts, name=name),
        T=T,
        texts=texts,
        bos=bos,
        max_batch_tokens=max_batch_tokens,
        progress=progress,
    )


def perplexity_on(
    subject: Subject,
    *,
    T: int = 64,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    max_batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> PerplexityResult:
    """As `perplexity`, on a model that was read already."""
    rows = subject.windows(texts, T, bos=bos)
    by_row: dict[int, float] = {}
    done = 0
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        sums = losses(subject.decoder, batch).double().reshape(len(batch.rows), -1).sum(dim=1)
        by_row |= zip((row.index for row in batch.rows), sums.tolist(), strict=True)
        done += sum(batch.lengths)
        if progress is not None:
            progress(done, T * len(rows))
    by_sequence = tuple(by_row[row.index] for row in rows)
    n_predicted = len(rows) * (T - 1)
    nll = math.fsum(by_sequence) / n_predicted if all(map(math.isfinite, by_sequence)) else math.nan
    if not nll < 700:  # e^700 is about the largest number that there is
        raise InputError(
            f"The texts cannot be predicted: the mean negative log-likelihood is {nll:g}. "
            "Load the model in a wider dtype, or see melayer locate."
        )
    ends = ratio_interval(by_sequence, [T - 1] * len(rows)) or (None, None)
    low, high = (None if end is None else finite(math.exp(min(end, 700))) for end in ends)
    return PerplexityResult(
        model=subject.info,
        settings=window_settings(rows, texts, bos),
        T=T,
        n_sequences=len(rows),
        n_predicted=n_predicted,
        nll=nll,
        perplexity=math.exp(nll),
        low=low,
        high=high,
        by_sequence=by_sequence,
    )
