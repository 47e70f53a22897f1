"""The whole report: every measurement of one model on one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from melayer.measurements.explain import report as explain_report
from melayer.measurements.locate import report as locate_report
from melayer.measurements.rigidity import report as rigidity_report
from melayer.measurements.sinks import report as sinks_report
from melayer.model.provenance import require_same_model, versions
from melayer.presentation.page import Facts, Page, Written, versions_fact, write_page
from melayer.presentation.sections import Section
from melayer.studies.sweep import report as sweep_report

if TYPE_CHECKING:
    from melayer.measurements.explain.result import ExplainResult
    from melayer.measurements.locate.result import LocateResult
    from melayer.measurements.rigidity.result import RigidityResult
    from melayer.measurements.sinks.result import SinksResult
    from melayer.studies.sweep.result import SweepResult

_TITLES = {"explain": explain_report.TITLE, "rigidity": rigidity_report.TITLE, "sinks": sinks_report.TITLE}
"""Of the sections that say why there is no result."""


def write_report(  # noqa: PLR0913 - each measurement by its name
    result: LocateResult,
    out: str | Path,
    *,
    explain: ExplainResult | None = None,
    rigidity: RigidityResult | None = None,
    sinks: SinksResult | None = None,
    sweep: SweepResult | None = None,
    not_measured: Mapping[str, str] | None = None,
    command: str | None = None,
    device: str | None = None,
    weights: dict[str, str] | None = None,
) -> Written:
    """Writes `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `locate` found.
        out: A directory; made if it is missing.
        explain: What `explain` found on the same model, for a section of its own.
        rigidity: What `rigidity` found.
        sinks: What `sinks` found.
        sweep: What `sweep` found.
        not_measured: For `explain`, `rigidity` or `sinks`, why there is no result; the page says so in its place.
        command: The command that made the report, for its provenance.
        device: Where the model ran.
        weights: The sha256 of each file of weights.

    Raises:
        InputError: A result is of another model than `result`.
        OutputError: `out` cannot be written.

    Example:
        >>> melayer.write_report(result, "out")  # doctest: +SKIP
    """
    for other in (explain, rigidity, sinks, sweep):
        if other is not None:
            require_same_model(
                result.model.fingerprint,
                other.model.fingerprint,
                f"The {type(other).__name__} is of another model (fingerprint {other.model.fingerprint}) than the "
                f"LocateResult ({result.model.fingerprint}). Give results of one model.",
            )
    sections, values = [locate_report.section(result)], {"locate": result.to_dict()}
    if explain is not None:
        sections.append(explain_report.section(explain))
        values["explain"] = explain.to_dict()
    if rigidity is not None:
        sections.append(rigidity_report.section(rigidity))
        values["rigidity"] = rigidity.to_dict()
    if sinks is not None:
        sections.append(sinks_report.section(sinks))
        values["sinks"] = sinks.to_dict()
    if sweep is not None:
        sections.append(sweep_report.section(sweep))
        values["sweep"] = sweep.to_dict()
    if not_measured:
        sections += [Section(key, _TITLES[key], f"Not measured. {why}", ()) for key, why in not_measured.items()]
        values["not_measured"] = dict(not_measured)
    provenance = {"device": device, "weights_sha256": weights or {}, "versions": versions()}
    facts = _facts(result, device, weights or {})
    page = Page(result.model.name, sections, result.notes, facts, values, provenance)
    return write_page(page, out, command=command)


def _facts(result: LocateResult, device: str | None, weights: Mapping[str, str]) -> Facts:
    criterion, settings, model = result.criterion, result.settings, result.model
    bos = settings["bos"]
    asked = {None: "left to the tokenizer", True: "asked for", False: "left out on request"}[bos["asked"]]
    return [
        ("Model", f"{model.name} ({model.family}, {model.n_layers} blocks, d_model {model.d_model})"),
        ("Fingerprint of the weights", model.fingerprint),
        *((f"sha256 of {name}", digest) for name, digest in weights.items()),
        ("dtype, device", f"{model.dtype}, {device or 'not recorded'}"),
        (
            "Criterion",
            f"|h| > {criterion.min_abs:g} and |h| > {criterion.min_ratio:g} × median (Sun et al. 2024); ME layer: "
            f"in more than {criterion.majority:.0%} of the texts and for at least {criterion.persistence:.0%} of the "
            "blocks",
        ),
        ("Texts", f"{settings['texts']}: {settings['n_sequences']} texts, {settings['n_tokens']:,} tokens"),
        ("Begin-of-sequence token", f"{asked}; {bos['sequences_with_bos']} texts start with it"),
        ("Counting", "blocks, tokens and dimensions from 0"),
        versions_fact(versions()),
    ]
