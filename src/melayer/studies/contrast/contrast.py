"""The same measurements on two models, side by side: did the ME layer move, did the sinks go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate_on
from melayer.measurements.rigidity.rigidity import rigidity_on
from melayer.measurements.settings import criterion_settings
from melayer.measurements.sinks.sinks import sinks_on
from melayer.model.subject import Subject
from melayer.runs.progress import Progress
from melayer.studies.contrast.result import ContrastResult, Figure, Measured
from melayer.studies.texts import texts_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from melayer.interventions.mask import WeMask


def measure(  # noqa: PLR0913 - the options of its measurements, each by its name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    T: int = 64,
    epsilon: float = 0.3,
    n_first_tokens: int = 64,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    mask: WeMask | None = None,
    name: str | None = None,
    part: Callable[[int], Progress] | None = None,
) -> Measured:
    """A model's ME layer, rigidity and sinks, for `contrast`.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        T: Tokens in each sequence, for the sinks.
        epsilon: A head is a sink head where key 0 draws more than this.
        n_first_tokens: How many different first tokens to compare.
        texts: What to run; by default a small varied set that melayer brings along.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: What counts as massive, and as the ME layer.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `wiring.read` does not find by itself.
        mask: What is applied to the model already, to be recorded.
        name: What to call the model in the result.
        part: From the number of a measurement, 0 to 2, when it begins, to what it reports to.

    Raises:
        InputError: An option is out of range, or the texts do not make a measurement.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.contrast(melayer.measure(a, tokenizer), melayer.measure(b, tokenizer)).sentence  # doctest: +SKIP
    """
    progress: Callable[[int], Progress | None] = part or (lambda _: None)
    subject = Subject.of(model, tokenizer, parts=parts, name=name)
    located = locate_on(
        subject, texts=texts, bos=bos, criterion=criterion, max_batch_tokens=max_batch_tokens, progress=progress(0)
    )
    rigid = rigidity_on(
        subject,
        texts=texts,
        n_first_tokens=n_first_tokens,
        located=located,
        bos=bos,
        criterion=criterion,
        max_batch_tokens=max_batch_tokens,
        progress=progress(1),
    )
    drawn = sinks_on(
        subject,
        T=T,
        epsilon=epsilon,
        texts=texts,
        bos=bos,
        criterion=criterion,
        max_batch_tokens=max_batch_tokens,
        progress=progress(2),
    )
    asked = {
        "T": T,
        "epsilon": epsilon,
        "n_first_tokens": n_first_tokens,
        "bos": bos,
        "criterion": criterion_settings(located.criterion),
        "texts": texts_sha256(builtin_texts() if texts is None else texts),
    }
    return Measured(located, rigid, drawn, asked, mask)


def contrast(before: Measured, after: Measured) -> ContrastResult:
    """What differs between two models, measured alike.

    Args:
        before: What `measure` found on one.
        after: What it found on the other.

    Raises:
        InputError: They were measured under different settings.

    Example:
        >>> melayer.contrast(before, after).sentence  # doctest: +SKIP
    """
    differing = sorted(key for key in before.asked if before.asked[key] != after.asked[key])
    if differing:
        raise InputError(f"The two were measured with different {', '.join(differing)}. Measure both alike.")
    at = before.located.me_layer
    first, second = _figures(before, at), _figures(after, at)
    figures = tuple(Figure(name, value, second[name]) for name, value in first.items())
    return ContrastResult(before, after, before.sinks.T, figures, tuple(dict.fromkeys(_notes(before, after))))


def _figures(side: Measured, at: int | None) -> dict[str, float | int | str | None]:
    """What is compared of one model, by name; sinks after block `at`, the ME layer of the first."""
    largest, block, dim = side.largest
    figures: dict[str, float | int | str | None] = {
        "ME layer": side.located.me_layer,
        "emergence": side.located.emergence,
        "largest |h|": largest,
        "at block": block,
        "in dimension": dim,
        "sink rate": side.sinks.rate,
    }
    if at is not None:
        figures[f"sink rate after block {at}"] = side.sinks_after(at)
    figures["lowest cosine to the next block, ME layer on"] = side.rigid
    figures["cosine across first tokens at the ME layer"] = _cosine_inputs(side)
    figures["effective rank of what attention reads"] = side.rigidity.mean_rank("attn_in")[0]
    return figures


def _cosine_inputs(side: Measured) -> float | None:
    me_layer = side.located.me_layer
    return None if me_layer is None else side.rigidity.cosine_inputs[me_layer]


def _notes(before: Measured, after: Measured) -> Iterator[str]:
    sides = (("Before", before), ("After", after))
    for what, side in sides:
        if side.mask is not None:
            yield f"{what}: measured under its mask ({side.mask.selector} {side.mask.rate:g})."
    for what, side in sides:
        for note in (*side.located.notes, *side.rigidity.notes, *side.sinks.notes):
            yield f"{what}: {note}"
