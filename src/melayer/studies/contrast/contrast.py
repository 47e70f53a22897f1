"""The same measurements on two models, side by side: did the ME layer move, did the sinks go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from melayer.data.texts import builtin_texts
from melayer.errors import InputError, collected
from melayer.interventions.mask import MadeFor
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate_on
from melayer.measurements.rigidity.rigidity import rigidity_on
from melayer.measurements.settings import criterion_settings
from melayer.measurements.sinks.sinks import sinks_on
from melayer.model.provenance import require_same_model
from melayer.model.subject import Subject
from melayer.runs.progress import Progress
from melayer.studies.contrast.result import ContrastResult, Figure, Measured, Value
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
        mask: What is applied to the model already, to be recorded. What it warns of is kept with the figures.
        name: What to call the model in the result.
        part: From the number of a measurement, 0 to 2, when it begins, to what it reports to.

    Raises:
        InputError: An option is out of range, or the texts do not make a measurement.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.contrast(melayer.measure(a, tokenizer), melayer.measure(b, tokenizer)).sentence  # doctest: +SKIP
    """
    progress: Callable[[int], Progress | None] = part or (lambda _: None)
    with collected() as said:
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
    return Measured(located, rigid, drawn, asked, mask, tuple(said))


def contrast(
    before: Measured,
    after: Measured,
    *,
    before_masked: Measured | None = None,
    after_masked: Measured | None = None,
) -> ContrastResult:
    """What differs between two models, measured alike.

    Where the second model carries a mask, measure each without it and with it: the change is then split into what
    training does without the mask, what the mask does to the first model, and what it does beyond that to the second.

    Args:
        before: What `measure` found on one.
        after: What it found on the other.
        before_masked: The first model under the mask.
        after_masked: The second model under the mask.

    Raises:
        InputError: They were measured under different settings, or what is said to be masked is not.

    Example:
        >>> melayer.contrast(before, after).sentence  # doctest: +SKIP
    """
    masked = {"before": (before, before_masked), "after": (after, after_masked)}
    for side in (after, before_masked, after_masked):
        _require_alike(before, side)
    for name, (plain, other) in masked.items():
        _require_masked(name, plain, other)
    at = before.located.me_layer
    sides = [None if side is None else _figures(side, at) for side in (before, after, before_masked, after_masked)]
    names = list(_figures(before, at))
    figures = tuple(Figure(name, *(None if side is None else side[name] for side in sides)) for name in names)
    result = ContrastResult(before, after, before.sinks.T, figures, (), before_masked, after_masked)
    return replace(result, notes=tuple(_notes(result)))


def _require_alike(before: Measured, other: Measured | None) -> None:
    differing = [] if other is None else sorted(key for key in before.asked if before.asked[key] != other.asked[key])
    if differing:
        raise InputError(f"The two were measured with different {', '.join(differing)}. Measure both alike.")


def _require_masked(name: str, plain: Measured, masked: Measured | None) -> None:
    """Raises InputError unless `masked` is the same model under a mask, and `plain` is without."""
    if masked is None:
        return
    if masked.mask is None or plain.mask is not None:
        raise InputError(
            f"{name}_masked was given; expected the model under a mask there (measure(..., mask=mask) inside of "
            f"mask.apply), and without one in {name}."
        )
    require_same_model(
        plain.located.model.fingerprint,
        masked.located.model.fingerprint,
        f"{name}_masked is of another model than {name}. Measure the same one twice, without the mask and with it.",
    )


def fitted(
    mask: WeMask, model: PreTrainedModel, plain: Measured, *, parts: Mapping[str, str] | None = None
) -> WeMask | None:
    """A mask for another model, as made for this one; None where it does not fit.

    Args:
        mask: What the other model carries.
        model: The one that it is wanted for.
        plain: What `measure` found on it.
        parts: Names of parts that `wiring.read` does not find by itself.
    """
    own = MadeFor.of(plain.located)
    other = mask.made_for or own
    if (other.family, other.n_layers, other.d_model) != (own.family, own.n_layers, own.d_model):
        return None
    made = replace(mask, made_for=own)
    try:
        with made.apply(model, parts=parts):
            return made
    except InputError:
        return None


def _figures(side: Measured, at: int | None) -> dict[str, Value]:
    """What is compared of one model, by name; sinks after block `at`, the ME layer of the first."""
    largest, block, dim = side.largest
    figures: dict[str, Value] = {
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


def _notes(result: ContrastResult) -> Iterator[str]:
    """What the reader has to know, each thing once: a masked model mostly repeats what is said of the plain one."""
    if result.after_masked is not None and result.after_masked.mask is not None:
        mask = result.after_masked.mask
        yield f"Masked: under the mask of the second model ({mask.selector} {mask.rate:g}, strength {mask.strength:g})."
        if result.before_masked is None:
            yield "The mask does not fit the first model, so what it does cannot be told apart from what training does."
    for what, side in (("Before", result.before), ("After", result.after)):
        if side.mask is not None:
            yield f"{what}: measured under its mask ({side.mask.selector} {side.mask.rate:g})."
    said: set[str] = set()
    for name, side in result.columns.items():
        for note in (*side.located.notes, *side.rigidity.notes, *side.sinks.notes, *side.notes):
            of_model = f"{name.partition(',')[0]}: {note}"
            if of_model not in said:
                said.add(of_model)
                yield f"{name.capitalize()}: {note}"
