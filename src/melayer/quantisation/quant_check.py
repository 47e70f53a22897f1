"""What quantised activations cost a model, and how much of that the massive token is to blame for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from melayer.data.rows import bos_note, token_text
from melayer.interventions.at_work import require_unmasked
from melayer.interventions.mask import Selector, WeMask
from melayer.measurements.criterion import Criterion
from melayer.measurements.settings import LAYERS_COUNTED_FROM, Origin, criterion_settings, origin_of
from melayer.model.subject import Subject
from melayer.numerics.intervals import LEVEL
from melayer.quantisation.calibration import GRANULARITIES, ScaleSet
from melayer.quantisation.check import Check
from melayer.quantisation.choices import Choices
from melayer.quantisation.comparison import compared
from melayer.quantisation.linear_inputs import find_linear_inputs
from melayer.quantisation.massive import Emergence, elsewhere, emergence
from melayer.quantisation.notes import remarks
from melayer.quantisation.plan import MaskOptions, Plan, planned, require_fit
from melayer.quantisation.result import InputRow, Prefix, QuantCheckResult
from melayer.quantisation.run import Passes, run_passes
from melayer.quantisation.sequences import CheckSequences, check_sequences, prefix_of
from melayer.quantisation.settings import QuantCheckSettings
from melayer.runs.progress import Bar, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "quant-check.jsonl"
"""Where the command keeps the finished settings, in the directory of the report."""


def quant_check(  # noqa: PLR0913 - the options of the command, each by its name
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
    calibration: Sequence[str] | None = None,
    formats: Sequence[str] = ("int8", "fp8", "int4"),
    granularities: Sequence[str] = GRANULARITIES,
    treatments: Sequence[str] | None = None,
    mask: WeMask | None = None,
    rate: float = 0.5,
    selector: Selector = "weight",
    strength: float = 1.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    prefix: Sequence[int] | None = None,
    T: int = 64,
    n_sequences: int = 32,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> QuantCheckResult:
    """The perplexity with simulated quantised activations, with and without the massive token in their way.

    What every linear map inside the blocks reads is rounded to a grid and back (not what the head reads, no weight
    and no key or value). Each sequence is the prefix and T - len(prefix) tokens of a text; each setting predicts the
    same tokens, from the second behind the prefix on.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        texts: What to predict; by default a small varied set that melayer brings along.
        calibration: What static scales are read from; by default every other sequence of `texts`, which then is not
            predicted.
        formats: Of int8, fp8 and int4.
        granularities: Of per-tensor, per-token and per-channel.
        treatments: Of plain, baked, baked+mask and mask; by default all that this model has something for.
        mask: The mask; by default one of the next five options on the blocks after the ME layer.
        rate: The share of the dimensions, see `WeMask`.
        selector: How they are chosen.
        strength: How much of a masked entry is taken away.
        layers: The masked blocks; by default all with softmax attention after the ME layer.
        seed: Of selector `random`.
        prefix: The ids that every sequence begins with and that the baked treatments bake; by default
            what the tokenizer puts in front of every text, if anything.
        T: Tokens in each sequence, the prefix counted.
        n_sequences: Sequences to predict, and to calibrate with, at most.
        bos: Whether the prefix is the begin-of-sequence token, where none is given; None leaves it to the tokenizer.
        criterion: What counts as massive, and as the ME layer, which is found in the calibration sequences.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model in the result.
        resume: A file that each finished setting is appended to at once. Those that it holds already are not
            measured again.
        progress: Called with the tokens done and the tokens in all.

    Raises:
        InputError: The texts or the options make no measurement, the mask does not fit, the model is quantised, or
            the file to go on from is of another check.
        ArchitectureError: A part of the model was not found.
        OutputError: The file cannot be written.

    Example:
        >>> result = melayer.quant_check(model, tokenizer, formats=["int8"])  # doctest: +SKIP
        >>> print(result.sentence)  # doctest: +SKIP
    """
    choices = Choices.of(formats, granularities, treatments)
    decoder = require_unmasked(model, parts)
    subject = Subject.of(decoder, tokenizer, name=name)
    criterion = criterion or Criterion()
    if mask is not None:
        require_fit(decoder, mask)
    rounded = find_linear_inputs(decoder)
    sequences = check_sequences(subject, prefix_of(subject, prefix, bos), texts, calibration, T=T, n=n_sequences)
    bar = Bar(progress, _n_tokens(sequences, choices))
    check = Check(subject, rounded.inputs, sequences, criterion, max_batch_tokens, bar)
    emerged = emergence(
        decoder,
        sequences.calibration_rows,
        criterion,
        max_batch_tokens=max_batch_tokens,
        progress=bar.part(sequences.calibration_tokens),
    )
    options = MaskOptions(rate, selector, strength, None if layers is None else tuple(layers), seed)
    plan = planned(check, choices, emerged, mask, options)
    settings = [
        ScaleSet(treatment, format, granularity)
        for format in choices.formats
        for granularity in choices.granularities
        for treatment in plan.treatments
    ]
    passes = run_passes(check, plan, settings, emerged, resume)
    given = _Given(choices, origin_of(texts), calibration is not None, bos)
    return _result(check, given, plan, emerged, passes, rounded.notes)


@dataclass(frozen=True)
class _Given:
    """What the caller chose, for the result's settings."""

    choices: Choices
    texts: Origin
    calibration: bool
    bos: bool | None


def _n_tokens(sequences: CheckSequences, choices: Choices) -> int:
    """Of all passes together, as far as it is known before the first."""
    n_masked = int(choices.masked)
    return (
        sequences.calibration_tokens * (2 + n_masked)
        + sequences.evaluation_tokens * (1 + n_masked + choices.n_settings)
    )  # fmt: skip


def _result(
    check: Check, given: _Given, plan: Plan, emerged: Emergence, passes: Passes, notes: Sequence[str]
) -> QuantCheckResult:
    sequences, me_layer = check.sequences, emerged.me_layer
    n_prefix, n_sequences = sequences.n_prefix, len(sequences.evaluation_rows)
    prefix = Prefix(
        sequences.prefix,
        tuple(token_text(check.subject.tokenizer, token) for token in sequences.prefix),
        tuple(passes.flags[:, :n_prefix].all(dim=0).tolist()),
    )
    massive_elsewhere = {
        "calibration": elsewhere(emerged.flags, n_prefix),
        "evaluation": elsewhere(passes.flags, n_prefix),
    }
    said = [*filter(None, [bos_note(rows) for rows in (sequences.calibration_rows, sequences.evaluation_rows)])]
    said += remarks(me_layer, prefix, massive_elsewhere, n_sequences, passes.baked)
    return QuantCheckResult(
        model=check.subject.info,
        settings=_settings(check, given, plan, emerged),
        me_layer=me_layer,
        T=sequences.T,
        n_sequences=n_sequences,
        n_calibration=len(sequences.calibration_rows),
        n_predicted=n_sequences * sequences.n_predicted,
        prefix=prefix,
        elsewhere=massive_elsewhere,
        unquantised=passes.unquantised,
        unquantised_mask=passes.masked_score,
        inputs=tuple(InputRow(at.layer, at.paths, at.width) for at in check.linear_inputs),
        rows=tuple(compared(passes.settings, passes.unquantised, sequences.n_predicted)),
        notes=tuple(dict.fromkeys([*notes, *plan.notes, *passes.notes, *said])),
        linear_inputs=check.linear_inputs,
        calibrated=passes.scales,
        baked=passes.baked,
    )


def _settings(check: Check, given: _Given, plan: Plan, emerged: Emergence) -> QuantCheckSettings:
    choices, bos_id = given.choices, check.subject.tokenizer.bos_token_id
    return {
        "formats": list(choices.formats),
        "granularities": list(choices.granularities),
        "treatments": list(plan.treatments),
        "texts": given.texts,
        "calibration": "given" if given.calibration else "every other sequence of the texts",
        "mask": None if plan.active_mask is None else asdict(plan.active_mask),
        "bos": {"asked": given.bos, "is_prefix": list(check.sequences.prefix) == [bos_id]},
        "criterion": criterion_settings(check.criterion),
        "massive_above": emerged.above,
        "level": LEVEL,
        "left_unquantised": "the head, weights, keys and values",
        "layers_counted_from": LAYERS_COUNTED_FROM,
    }
