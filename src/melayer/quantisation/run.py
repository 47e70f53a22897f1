"""The passes of a check: calibration, the model without rounding, and every setting that is not finished yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from melayer.errors import collected
from melayer.interventions.baked_prefix import BakedPrefix
from melayer.interventions.mask import WeMask
from melayer.measurements.settings import criterion_settings
from melayer.quantisation.calibration import Maxima, ScaleSet, maxima
from melayer.quantisation.check import Check
from melayer.quantisation.massive import Emergence, massive_tokens, with_prefix
from melayer.quantisation.plan import Plan
from melayer.quantisation.result import PerplexityScore, Setting
from melayer.quantisation.rounding import Rounding
from melayer.quantisation.scoring import Scorer, require_finite
from melayer.quantisation.sequences import sha256_of
from melayer.quantisation.treatments import BAKED, MASKED, Treatment
from melayer.runs.progress import Progress
from melayer.runs.resume_log import Entries, ResumeLog
from melayer.version import __version__

ENTRIES = Entries("quant-check", "setting", Setting, lambda setting: setting.scale_set)
"""How finished settings are kept."""


@dataclass(frozen=True, eq=False)
class Passes:
    """What the passes gave."""

    unquantised: PerplexityScore
    masked_score: PerplexityScore | None
    """Under the mask, unquantised; None where no treatment has one."""
    flags: torch.Tensor
    """[n_sequences, T] the massive tokens of the evaluation sequences."""
    settings: tuple[Setting, ...]
    """Each by itself, in the order asked for."""
    scales: Mapping[ScaleSet, tuple[torch.Tensor, ...]]
    """Of the static settings."""
    baked: Mapping[Treatment, BakedPrefix]
    notes: tuple[str, ...]


def run_passes(
    check: Check, plan: Plan, settings: Sequence[ScaleSet], emerged: Emergence, resume: str | Path | None
) -> Passes:
    """Runs everything but the first pass, which found the massive tokens.

    Args:
        check: What is run.
        plan: The treatments and their mask.
        settings: Which formats, granularities and treatments.
        emerged: Where massive tokens emerge.
        resume: A file that finished settings are kept in, and that those finished before are read from.

    Raises:
        InputError: The losses are not finite, or the file is of another check.
        OutputError: The file cannot be written.
    """
    log = ResumeLog.opened(ENTRIES, resume, _depends_on(check, plan))
    scorer = Scorer(check.decoder, check.sequences, check.max_batch_tokens)
    with collected() as said:
        # Before any long run: whatever is wrong with a mask is wrong now.
        baked = _baked(check, plan)
        calibrated = _calibrated(check, plan, emerged.flags)
        flags, unquantised = _unquantised(check, scorer, emerged)
        masked_score = None if plan.active_mask is None else _masked_score(check, scorer, plan.active_mask)
        excluded = with_prefix(flags, check.sequences.n_prefix)
        runner = _SettingRunner(check, plan, scorer, calibrated, baked, excluded)
        for setting in settings:
            part = check.bar.part(check.sequences.evaluation_tokens)
            if setting not in log.items:
                log.add(*runner.run(setting, part))
    return Passes(
        unquantised=unquantised,
        masked_score=masked_score,
        flags=flags,
        settings=tuple(log.items[setting] for setting in settings),
        scales={setting: steps for setting in settings if (steps := runner.scales(setting)) is not None},
        baked=baked,
        notes=(*said, *log.notes_of(settings)),
    )


def _baked(check: Check, plan: Plan) -> dict[Treatment, BakedPrefix]:
    return {
        treatment: BakedPrefix.of(check.decoder, check.sequences.prefix, plan.mask_of(treatment))
        for treatment in BAKED
        if treatment in plan.treatments
    }


def _calibrated(check: Check, plan: Plan, flags: torch.Tensor) -> dict[bool, Maxima]:
    """The maxima of the linear inputs with and without the mask, as far as the treatments need them."""
    excluded = with_prefix(flags, check.sequences.n_prefix)
    by_mask: dict[bool, Maxima] = {}
    for masked in sorted({treatment in MASKED for treatment in plan.treatments}):
        with check.under(plan.active_mask if masked else None):
            by_mask[masked] = maxima(
                check.decoder,
                check.linear_inputs,
                check.sequences.calibration_rows,
                excluded,
                max_batch_tokens=check.max_batch_tokens,
                progress=check.bar.part(check.sequences.calibration_tokens),
            )
    return by_mask


def _unquantised(check: Check, scorer: Scorer, emerged: Emergence) -> tuple[torch.Tensor, PerplexityScore]:
    rows, part = check.sequences.evaluation_rows, check.bar.part(check.sequences.evaluation_tokens)
    flags = massive_tokens(
        check.decoder, rows, emerged.me_layer, emerged.above, max_batch_tokens=check.max_batch_tokens
    )  # fmt: skip
    score = scorer.score(part)
    require_finite(score)
    return flags, score


def _masked_score(check: Check, scorer: Scorer, mask: WeMask) -> PerplexityScore:
    with check.under(mask):
        return scorer.score(check.bar.part(check.sequences.evaluation_tokens))


def _depends_on(check: Check, plan: Plan) -> dict[str, Any]:
    """What the figures of a setting depend on, beside the setting itself."""
    mask = plan.active_mask
    if mask is not None:
        # The model is that of the fingerprint. A threshold decides only which tokens are masked, if massive ones are.
        above = mask.massive_above if mask.positions == "massive" else None
        mask = replace(mask, made_for=None, massive_above=above)
    return {
        "fingerprint": check.subject.info.fingerprint,
        "dtype": str(check.subject.model.dtype),
        "melayer_version": __version__,
        "criterion": criterion_settings(check.criterion),
        "mask": None if mask is None else repr(mask),
        "sequences": sha256_of(check.sequences.evaluation_rows),
        "calibration": sha256_of(check.sequences.calibration_rows),
        "prefix": check.sequences.prefix,
    }


@dataclass(frozen=True, eq=False)
class _SettingRunner:
    """Runs the evaluation sequences as one setting has them."""

    check: Check
    plan: Plan
    scorer: Scorer
    calibrated: Mapping[bool, Maxima]
    baked: Mapping[Treatment, BakedPrefix]
    excluded: torch.Tensor
    """[n_sequences, T] the prefix and the massive tokens, whose errors are counted apart."""

    def scales(self, setting: ScaleSet) -> tuple[torch.Tensor, ...] | None:
        """The step of each linear input; None where each token has its own."""
        maxima_of = self.calibrated[setting.treatment in MASKED]
        return maxima_of.scales(setting.format, setting.granularity, left_out=setting.treatment in BAKED)

    def run(self, setting: ScaleSet, progress: Progress | None) -> tuple[Setting, list[str]]:
        """Its score and errors, and what was warned of meanwhile."""
        check = self.check
        rounding = Rounding(check.decoder, check.linear_inputs, setting.format, self.scales(setting), self.excluded)
        # Where the prefix is baked, the mask is in its keys and values and nowhere else.
        mask = self.plan.active_mask if setting.treatment == "mask" else None
        with collected() as said, check.under(mask):
            score = self.scorer.score(progress, rounding, self.baked.get(setting.treatment))
        error, error_excluded = rounding.errors()
        measured = Setting(
            setting.format, setting.granularity, setting.treatment, score, None, None, None, error, error_excluded
        )
        return measured, [f"{measured.label}: {text}" for text in said]
