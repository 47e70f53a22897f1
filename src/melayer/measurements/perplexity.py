"""How well a model predicts texts: the mean negative log-likelihood of a token, and its exponential."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from melayer.data.rows import batches
from melayer.errors import InputError
from melayer.measurements.settings import WindowSettings, window_settings
from melayer.model.losses import losses
from melayer.model.provenance import ModelInfo
from melayer.model.subject import Subject
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

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        return (
            f"Over {self.n_sequences} sequences of T = {self.T} tokens the perplexity is {self.perplexity:,.2f} "
            f"({self.nll:.4f} nats a token, {self.n_predicted:,} tokens predicted)."
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
    total, done = 0.0, 0
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        total += float(losses(subject.decoder, batch).double().sum())
        done += sum(batch.lengths)
        if progress is not None:
            progress(done, T * len(rows))
    n_predicted = len(rows) * (T - 1)
    nll = total / n_predicted
    if not nll < 700:  # e^700 is about the largest number that there is
        raise InputError(
            f"The texts cannot be predicted: the mean negative log-likelihood is {nll:g}. "
            "Load the model in a wider dtype, or see melayer locate."
        )
    return PerplexityResult(
        model=subject.info,
        settings=window_settings(rows, texts, bos),
        T=T,
        n_sequences=len(rows),
        n_predicted=n_predicted,
        nll=nll,
        perplexity=math.exp(nll),
    )
