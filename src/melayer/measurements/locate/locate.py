"""Where the massive activation emerges: the ME layer, its stages, and where it is erased again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from melayer.data.rows import batches
from melayer.errors import InputError, collected
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.conclude import conclude
from melayer.measurements.locate.first_tokens import first_tokens_on
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.locate.trajectory import trajectories
from melayer.measurements.settings import locate_settings
from melayer.measurements.summaries import MassiveDims, summaries_of
from melayer.model.subject import Subject
from melayer.runs.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(  # noqa: PLR0913 - public: every option has a name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_listed: int = 16,
    max_batch_tokens: int = 2048,
    other_first_tokens: bool = True,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> LocateResult:
    """Where the massive activation of a model emerges, grows and is erased.

    One pass over the texts keeps summaries of every block's output. A second one follows the massive tokens
    alone: a token sees only what is before it, so the rest of its sequence is left out. A third one, small, looks at
    a few short texts with other first tokens.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to run; by default a small varied set that melayer brings along.
        max_tokens: Tokens kept of each text; by default 512, or the model's positions if they are fewer.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: Thresholds, persistence and majority.
        max_listed: How many massive scalars to list for each sequence and block; all are counted.
        max_batch_tokens: Tokens in one forward pass, padding counted.
        other_first_tokens: Look at up to 3 texts of up to 32 tokens as they are run, without BOS, with it, and with
            the chat template's first token, and say where the finding hangs on that.
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.

    Returns:
        The result, on the host. "None found" is a result.

    Raises:
        InputError: The texts or the options make no measurement.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> result = melayer.locate(model, tokenizer, texts=["The sky is clear today."])  # doctest: +SKIP
        >>> result.me_layer, result.emergence  # doctest: +SKIP
        (11, 'single')
    """
    return locate_on(
        Subject.of(model, tokenizer, parts=parts, name=name),
        texts=texts,
        max_tokens=max_tokens,
        bos=bos,
        criterion=criterion,
        max_listed=max_listed,
        max_batch_tokens=max_batch_tokens,
        other_first_tokens=other_first_tokens,
        progress=progress,
    )


def locate_on(  # noqa: PLR0913 - the options of the public function
    subject: Subject,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_listed: int = 16,
    max_batch_tokens: int = 2048,
    other_first_tokens: bool = False,
    progress: Progress | None = None,
) -> LocateResult:
    """As `locate`, on a model that was read already; other first tokens are looked at only where asked for."""
    criterion = criterion or Criterion()
    if max_listed < 1:
        raise InputError(f"max_listed is {max_listed}; expected at least 1.")
    rows = subject.rows(texts, max_tokens=max_tokens, bos=bos)
    passes, dims = list(batches(rows, max_batch_tokens=max_batch_tokens)), MassiveDims()
    result = conclude(
        rows,
        summaries_of(subject.decoder, passes, criterion, k=max_listed, progress=progress, on_summary=dims.add),
        dims,
        criterion,
        subject.info,
        locate_settings(rows, texts, max_tokens, bos, max_listed),
        lambda targets: trajectories(subject.decoder, targets, max_batch_tokens=max_batch_tokens),
    )
    if not other_first_tokens or result.non_finite is not None:
        return result
    # A mask that is applied would warn of first tokens that nobody has given.
    with collected():
        looked = first_tokens_on(subject, rows, criterion, max_batch_tokens=max_batch_tokens)
    return replace(result, first_tokens=looked, notes=(*result.notes, *looked.notes))
