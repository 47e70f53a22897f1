"""What quantised activations cost a model, and how much of that the massive token is to blame for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from melayer.data.rows import Batch, Row, batches, token_text
from melayer.errors import InputError, collected
from melayer.interventions.apply import require_unmasked
from melayer.interventions.baked_prefix import BakedPrefix
from melayer.interventions.mask import MadeFor, Selector, WeMask
from melayer.measurements.criterion import Criterion, find_me_layer
from melayer.measurements.summaries import summaries_of
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.model.losses import losses
from melayer.model.provenance import describe, fingerprint
from melayer.numerics.grids import FORMATS
from melayer.numerics.paired import LEVEL, interval
from melayer.quantisation.calibration import GRANULARITIES, Maxima, ScaleSet, maxima
from melayer.quantisation.linear_inputs import LinearInput, linear_inputs
from melayer.quantisation.result import (
    BAKED,
    MASKED,
    TREATMENTS,
    Difference,
    Elsewhere,
    InputRow,
    Prefix,
    QuantCheckResult,
    Score,
    Setting,
    Treatment,
)
from melayer.quantisation.rounding import Rounding
from melayer.quantisation.sequences import _hash, _prefix, _sequences
from melayer.runs import resume as finished
from melayer.runs.progress import Bar, Progress
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WITHOUT_MASK: Mapping[Treatment, Treatment] = {"mask": "plain", "baked+mask": "baked"}

FILE, _WHAT = "quant-check.jsonl", "quant-check"

_FEW = 10
"""Fewer sequences than this make a rough interval."""


# --- the measurement -----------------------------------------------------------------------------------------------


def quant_check(
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
        prefix: The ids that every sequence begins with and that the baked treatments bake; by default the
            begin-of-sequence token, where there is one.
        T: Tokens in each sequence, the prefix counted.
        n_sequences: Sequences to predict, and to calibrate with, at most.
        bos: Whether the prefix is the begin-of-sequence token, where none is given; None: if the tokenizer has one.
        criterion: What counts as massive, and as the ME layer, which is found in the calibration sequences.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `architecture.read` does not find by itself.
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
    kinds = [
        known("format", formats, FORMATS),
        known("granularity", granularities, GRANULARITIES),
        known("treatment", TREATMENTS if treatments is None else treatments, TREATMENTS),
    ]
    decoder = require_unmasked(model, parts)
    if mask is not None:
        with collected(), mask.apply(model, parts=parts):
            pass
    found = linear_inputs(decoder)
    ids = _prefix(decoder, tokenizer, prefix, bos)
    held, predicted = _sequences(decoder, tokenizer, texts, calibration, ids, T, n_sequences)
    notes = list(found.notes)
    criterion = criterion or Criterion()
    n_masked = int(treatments is None or any(of in MASKED for of in kinds[2]))
    total = T * (len(held) * (2 + n_masked) + len(predicted) * (1 + n_masked + _product(kinds)))
    bar = Bar(progress, total)
    shared = {"max_batch_tokens": max_batch_tokens}

    me_layer, above, apart = _massive(decoder, held, criterion, bar.part(T * len(held)), max_batch_tokens)
    chosen, said = _possible(kinds[2], treatments is not None, me_layer, mask, bool(ids))
    notes += said
    masking = any(of in MASKED for of in chosen)
    if mask is None and masking:
        assert me_layer is not None
        info = describe(decoder, name)
        mask = WeMask(
            rate=rate,
            selector=selector,
            strength=strength,
            layers=None if layers is None else tuple(layers),
            seed=seed,
            me_layer=me_layer,
            massive_above=above,
            made_for=MadeFor(info.family, info.n_layers, info.d_model, info.fingerprint),
        )
        try:
            with collected(), mask.apply(model, parts=parts):
                pass
        except InputError as error:
            if treatments is not None or layers is not None:
                raise
            notes += [f"Not measured: {of}, since {error}" for of in chosen if of in MASKED]
            chosen, masking = tuple(of for of in chosen if of not in MASKED), False
    worn = mask if masking else None
    with collected() as said:
        # Before any long run: whatever is wrong with a mask is wrong now.
        baked = {of: BakedPrefix.of(model, ids, worn if of in MASKED else None) for of in BAKED if of in chosen}
        apart[:, : len(ids)] = True
        calibrated: dict[bool, Maxima] = {}
        for masked in sorted({of in MASKED for of in chosen}):
            with worn.apply(model, parts=parts) if worn and masked else nullcontext():
                calibrated[masked] = maxima(
                    decoder, found.found, held, apart, progress=bar.part(T * len(held)), **shared
                )
        run = _Run(decoder, found.found, predicted, len(ids), max_batch_tokens)
        plain, flags = run.massive(me_layer, above, bar.part(T * len(predicted)))
        under = None
        if worn is not None:
            with worn.apply(model, parts=parts):
                under = run.scored(bar.part(T * len(predicted)))
        kept = _Kept()
        if resume is not None:
            kept = _Kept.opened(
                Path(resume),
                {
                    "fingerprint": fingerprint(decoder.model),
                    "dtype": str(decoder.model.dtype),
                    "melayer_version": __version__,
                    "criterion": asdict(criterion),
                    "mask": None if worn is None else repr(replace(worn, made_for=None, massive_above=None)),
                    "sequences": _hash(predicted),
                    "calibration": _hash(held),
                    "prefix": ids,
                },
            )
        sets: dict[ScaleSet, tuple[torch.Tensor, ...]] = {}
        asked = [ScaleSet(of, format, by) for format in kinds[0] for by in kinds[1] for of in chosen]
        for of in asked:
            treatment: Treatment = of.treatment  # type: ignore[assignment]
            grid = calibrated[treatment in MASKED].scales(of.format, of.granularity, left_out=treatment in BAKED)
            if grid is not None:
                sets[of] = grid
            part = bar.part(T * len(predicted))
            if of in kept.settings:
                continue
            rounding = Rounding(found.found, of.format, grid, flags)
            # Where the prefix is baked, the mask is in its keys and values and nowhere else.
            hooked = worn.apply(model, parts=parts) if worn and treatment == "mask" else nullcontext()
            with collected() as of_setting, hooked:
                score = run.scored(part, rounding, baked.get(treatment))
            setting = Setting(of.format, of.granularity, treatment, score, None, None, None, *rounding.errors())
            kept.add(of, setting, [f"{setting.label}: {text}" for text in of_setting])
    notes += [*said, *(note for of in asked for note in kept.notes[of])]
    elsewhere = {
        "calibration": Elsewhere(int(apart[:, len(ids) :].sum()), apart[:, len(ids) :].numel()),
        "evaluation": Elsewhere(int(flags[:, len(ids) :].sum()), flags[:, len(ids) :].numel()),
    }
    start = Prefix(
        tuple(ids),
        tuple(token_text(tokenizer, token) for token in ids),
        tuple(bool(flag) for flag in run.prefix_massive),
    )
    notes += _remarks(me_layer, start, elsewhere, len(predicted), bool(baked))
    notes += [
        f"The prefix of {of} cannot be written: {why}." for of, found in baked.items() if (why := found.unwritable)
    ]
    sizes = [T - len(ids) - 1] * len(predicted)
    return QuantCheckResult(
        model=describe(decoder, name),
        settings={
            "formats": list(kinds[0]),
            "granularities": list(kinds[1]),
            "treatments": list(chosen),
            "texts": "built-in" if texts is None else "given",
            "calibration": "every other sequence of the texts" if calibration is None else "given",
            "mask": None if worn is None else asdict(worn),
            "bos": {"asked": bos, "is_prefix": list(ids) == [tokenizer.bos_token_id]},
            "criterion": asdict(criterion),
            "massive_above": above,
            "level": LEVEL,
            "left_unquantised": "the head, weights, keys and values",
            "layers_counted_from": 0,
        },
        me_layer=me_layer,
        T=T,
        n_sequences=len(predicted),
        n_calibration=len(held),
        n_predicted=sum(sizes),
        prefix=start,
        elsewhere=elsewhere,
        unquantised=plain,
        unquantised_mask=under,
        inputs=tuple(InputRow(at.layer, at.paths, at.width) for at in found.found),
        rows=tuple(_compared([kept.settings[of] for of in asked], plain, sizes)),
        notes=tuple(dict.fromkeys(notes)),
        linear_inputs=found.found,
        calibrated=sets,
        baked=baked,
    )


# --- running -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """The evaluation sequences, run again for every setting."""

    decoder: Decoder
    inputs: Sequence[LinearInput]
    rows: Sequence[Row]
    n_prefix: int
    max_batch_tokens: int
    prefix_massive: tuple[bool, ...] = ()

    def scored(
        self, progress: Progress | None, rounding: Rounding | None = None, baked: BakedPrefix | None = None
    ) -> Score:
        """The losses of the tokens from the second behind the prefix on, whatever runs before them."""
        found: dict[int, float] = {}
        done, total = 0, sum(map(len, self.rows))
        for batch in batches(self.rows, max_batch_tokens=self.max_batch_tokens):
            used, cache = batch, None
            if baked is not None:
                cache = baked.rows(len(batch.rows))
                used = replace(
                    batch, ids=batch.ids[:, self.n_prefix :], attention_mask=batch.attention_mask[:, self.n_prefix :]
                )
            with rounding.of(used) if rounding is not None else nullcontext():
                loss = losses(self.decoder, used, cache=cache).reshape(len(batch.rows), -1)
            kept = loss if baked is not None else loss[:, self.n_prefix :]
            for row, value in zip(batch.rows, kept.double().sum(dim=1).tolist(), strict=True):
                found[row.index] = value
            done += sum(batch.lengths)
            if progress is not None:
                progress(done, total)
        return _score([found[row.index] for row in self.rows], len(self.rows[0]) - self.n_prefix - 1)

    def massive(self, me_layer: int | None, above: float, progress: Progress | None) -> tuple[Score, torch.Tensor]:
        """The unquantised score, and [n_sequences, T] the prefix and the massive tokens behind it."""
        flags = torch.zeros(len(self.rows), len(self.rows[0]), dtype=torch.bool)
        if me_layer is not None:
            largest: list[torch.Tensor] = []
            point = self.decoder.blocks[me_layer].sites["block_out"]
            for batch in batches(self.rows, max_batch_tokens=self.max_batch_tokens):
                with hooks.watch([(0, point)], lambda _, x: largest.append(x.abs().amax(dim=-1).float().cpu())):
                    forward(self.decoder.model, batch)
                flags[[row.index for row in batch.rows]] = largest.pop() > above
        self.prefix_massive = tuple(flags[:, : self.n_prefix].all(dim=0).tolist())
        score = self.scored(progress)
        if any(value is None for value in score.by_sequence):
            raise InputError(
                "The texts cannot be predicted: the log-losses of the unquantised model are not finite. Load the "
                "model in a wider dtype, or see melayer locate."
            )
        flags[:, : self.n_prefix] = True
        return score, flags


@dataclass(eq=False)
class _Kept:
    """The finished settings with what was noted, in memory and, a line each, in a file."""

    path: Path | None = None
    settings: dict[ScaleSet, Setting] = field(default_factory=dict)
    notes: dict[ScaleSet, list[str]] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, subject: dict[str, Any]) -> _Kept:
        """What the file holds, see `finished.begun`."""
        kept = cls(path)
        for setting, notes in finished.begun(path, _WHAT, subject, _read):
            of = ScaleSet(setting.treatment, setting.format, setting.granularity)
            kept.settings[of], kept.notes[of] = setting, notes
        return kept

    def add(self, of: ScaleSet, setting: Setting, notes: list[str]) -> None:
        """Keeps a finished setting, on the disk before the next one begins."""
        self.settings[of], self.notes[of] = setting, notes
        if self.path is not None:
            finished.keep(self.path, _WHAT, {"setting": asdict(setting), "notes": notes})


def _read(values: dict[str, Any]) -> tuple[Setting, list[str]]:
    return Setting.from_dict(values["setting"]), list(values["notes"])


def _score(by_sequence: Sequence[float], size: int) -> Score:
    values = tuple(value if math.isfinite(value) else None for value in by_sequence)
    nll = sum(by_sequence) / (size * len(by_sequence))
    if not nll < 700:  # e^700 is about the largest number that there is
        return Score(None, None, values)
    return Score(nll, math.exp(nll), values)


def _compared(rows: Sequence[Setting], plain: Score, sizes: Sequence[int]) -> Iterator[Setting]:
    by_key = {(row.format, row.granularity, row.treatment): row for row in rows}
    for row in rows:
        untreated = by_key.get((row.format, row.granularity, "plain"))
        unmasked = by_key.get((row.format, row.granularity, _WITHOUT_MASK.get(row.treatment, "plain")))
        yield replace(
            row,
            cost=_difference(plain, row.score, sizes),
            against_plain=_difference(untreated.score, row.score, sizes) if untreated and untreated != row else None,
            by_mask=_difference(unmasked.score, row.score, sizes) if unmasked and row.treatment in MASKED else None,
        )


def _difference(base: Score, other: Score, sizes: Sequence[int]) -> Difference | None:
    pairs = [(b, o) for b, o in zip(base.by_sequence, other.by_sequence, strict=True) if b is not None is not o]
    first, second = [b for b, _ in pairs if b is not None], [o for _, o in pairs if o is not None]
    if not (len(first) == len(second) == len(sizes)):
        return None
    value, low, high = interval(first, second, sizes)
    return Difference(value, low, high) if len(sizes) > 1 else Difference(value, None, None)


# --- what is run ---------------------------------------------------------------------------------------------------


def known(what: str, given: Sequence[str], among: Sequence[Any]) -> tuple[Any, ...]:
    """The names given, once each.

    Raises:
        InputError: There is none, or one is not among those that there are.
    """
    if not given:
        raise InputError(f"There is no {what} to measure. Give some of {', '.join(among)}.")
    for name in given:
        if name not in among:
            near = difflib.get_close_matches(str(name), among, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"There is no {what} {name!r}; expected some of {', '.join(among)}.{meant}")
    return tuple(dict.fromkeys(given))


def _massive(
    decoder: Decoder, rows: Sequence[Row], criterion: Criterion, progress: Progress | None, max_batch_tokens: int
) -> tuple[int | None, float, torch.Tensor]:
    """The ME layer, what a token must exceed there to be massive, and [n_sequences, T] which do."""
    largest: dict[int, dict[int, torch.Tensor]] = {}
    points = [(block.layer, block.sites["block_out"]) for block in decoder.blocks]

    @contextmanager
    def listening(batch: Batch) -> Iterator[None]:
        def see(layer: int, hidden: torch.Tensor) -> None:
            for row, values in zip(batch.rows, hidden.abs().amax(dim=-1).float().cpu(), strict=True):
                largest.setdefault(layer, {})[row.index] = values

        with hooks.watch(points, see):
            yield

    found = summaries_of(
        decoder, rows, criterion, k=1, max_batch_tokens=max_batch_tokens, progress=progress, around=listening
    )
    for row in rows:
        bad = found[row.index].n_non_finite.nonzero()[0]
        if len(bad):
            raise InputError(
                f"The activations are not finite from the output of block {int(bad[0]) - 1} on, so they have no scale. "
                "Load the model in a wider dtype, or see melayer locate."
            )
    holding = np.stack([found[row.index].n_massive[1:] > 0 for row in rows])
    at = find_me_layer(holding, criterion)
    if at is None:
        return None, 0.0, torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
    top = max(rows, key=lambda row: abs(float(found[row.index].values[at + 1, 0])))
    above = max(criterion.min_abs, criterion.min_ratio * float(found[top.index].median_abs[at + 1]))
    return at, above, torch.stack([largest[at][row.index] for row in rows]) > above


def _possible(
    asked: Sequence[Treatment], explicit: bool, me_layer: int | None, mask: WeMask | None, prefix: bool
) -> tuple[tuple[Treatment, ...], list[str]]:
    """The treatments that there is something for; raises where one was asked for that there is not."""
    reasons = {}
    if not prefix:
        reasons.update(
            dict.fromkeys(
                BAKED,
                "without a begin-of-sequence token there is no fixed first token to bake; give a prefix (--prefix)",
            )
        )
    if me_layer is None and mask is None:
        reasons.update(dict.fromkeys(MASKED, "there is no ME layer in these texts, so there is nothing to mask"))
    if mask is not None and mask.positions != "first":
        reasons["baked+mask"] = "only a mask on first tokens can be baked"
    left = [of for of in asked if of in reasons]
    if left and explicit:
        raise InputError(f"Treatment {left[0]!r} cannot be measured: {reasons[left[0]]}.")
    return tuple(of for of in asked if of not in reasons), [f"Not measured: {of}, since {reasons[of]}." for of in left]


def _remarks(
    me_layer: int | None, prefix: Prefix, elsewhere: Mapping[str, Elsewhere], n: int, baked: bool
) -> Iterator[str]:
    if me_layer is None:
        yield "No ME layer was found in the calibration sequences: there is no massive token to bake."
    elif baked and not any(prefix.massive):
        yield "No token of the prefix is massive, so baking it takes no massive token away."
    for what, found in elsewhere.items():
        if found.n and baked:
            one = found.n == 1
            then = (
                ("is left out of it" if one else "are left out of it")
                if what == "calibration"
                else ("saturates" if one else "saturate")
            )
            yield (
                f"{found.n} massive token{'' if one else 's'} of the {what} sequences, behind the prefix and so not "
                f"baked, {then} ({found.n_tokens:,} tokens in all)."
            )
    if n < _FEW:
        yield f"With {n} sequences the intervals are rough."


def _product(kinds: Sequence[Sequence[str]]) -> int:
    return math.prod(map(len, kinds))
