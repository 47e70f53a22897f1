"""The whole report: every measurement of one model on one page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.measurements.explain.report import section as explain_section
from melayer.measurements.explain.result import ExplainResult
from melayer.measurements.locate.report import section as locate_section
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.rigidity.report import section as rigidity_section
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.sinks.report import section as sinks_section
from melayer.measurements.sinks.result import SinksResult
from melayer.model.provenance import require_same_model, versions
from melayer.presentation.page import Written, _write, check_writable, render
from melayer.presentation.sections import Section
from melayer.studies.sweep.report import section as sweep_section
from melayer.studies.sweep.result import SweepResult
from melayer.version import __version__

if TYPE_CHECKING:
    pass

_TITLES = {"explain": "Why it is there", "rigidity": "What it makes rigid", "sinks": "What attention does with it"}


def write_report(
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
    out = Path(out)
    check_writable(out)
    missing = dict(not_measured or {})
    for given in (explain, rigidity, sinks, sweep):
        if given is not None:
            require_same_model(
                result.model.fingerprint,
                given.model.fingerprint,
                f"The {type(given).__name__} is of another model (fingerprint {given.model.fingerprint}) than the "
                f"LocateResult ({result.model.fingerprint}). Give results of one model.",
            )
    sections = [locate_section(result)]
    if explain is not None:
        sections.append(explain_section(explain))
    if rigidity is not None:
        sections.append(rigidity_section(rigidity))
    if sinks is not None:
        sections.append(sinks_section(sinks))
    if sweep is not None:
        sections.append(sweep_section(sweep))
    sections += [Section(key, _TITLES[key], f"Not measured. {reason}", ()) for key, reason in missing.items()]
    provenance = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": device,
        "weights_sha256": weights or {},
        "versions": versions(),
    }
    values = {"melayer_version": __version__, "provenance": provenance, "locate": result.to_dict()}
    values |= {
        key: found.to_dict()
        for key, found in (("explain", explain), ("rigidity", rigidity), ("sinks", sinks), ("sweep", sweep))
        if found is not None
    }
    if missing:
        values["not_measured"] = missing
    page = render(sections, result.model.name, result.notes, _facts(result, provenance))
    return _write(out, page, values)


def _facts(result: LocateResult, provenance: dict[str, Any]) -> list[tuple[str, str]]:
    criterion, settings, model = result.criterion, result.settings, result.model
    bos = settings["bos"]
    asked = {None: "left to the tokenizer", True: "asked for", False: "left out on request"}[bos["asked"]]
    facts = [
        ("Model", f"{model.name} ({model.family}, {model.n_layers} blocks, d_model {model.d_model})"),
        ("Fingerprint of the weights", model.fingerprint),
        *((f"sha256 of {name}", digest) for name, digest in provenance["weights_sha256"].items()),
        ("dtype, device", f"{model.dtype}, {provenance['device'] or 'not recorded'}"),
        (
            "Criterion",
            f"|h| > {criterion.min_abs:g} and |h| > {criterion.min_ratio:g} × median (Sun et al. 2024); ME layer: "
            f"in more than {criterion.majority:.0%} of the texts and for at least {criterion.persistence:.0%} of the "
            "blocks",
        ),
        ("Texts", f"{settings['texts']}: {settings['n_sequences']} texts, {settings['n_tokens']:,} tokens"),
        ("Begin-of-sequence token", f"{asked}; {bos['sequences_with_bos']} texts start with it"),
        ("Counting", "blocks, tokens and dimensions from 0"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())),
        ("Made", provenance["date"]),
    ]
    if provenance["command"]:
        facts.append(("Command", provenance["command"]))
    return facts
