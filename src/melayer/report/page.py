"""One HTML file that works offline, and the same results as JSON beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import InputError, OutputError
from melayer.explain import ExplainResult
from melayer.locate import LocateResult
from melayer.provenance import versions
from melayer.report.contrast import section as contrast_section
from melayer.report.evaluate import section as evaluate_section
from melayer.report.explain import section as explain_section
from melayer.report.locate import section as locate_section
from melayer.report.quant_check import section as quant_check_section
from melayer.report.rigidity import section as rigidity_section
from melayer.report.scan import section as scan_section
from melayer.report.sections import Plot, Section
from melayer.report.sinks import section as sinks_section
from melayer.report.sweep import section as sweep_section
from melayer.report.tune import section as tune_section
from melayer.rigidity import RigidityResult
from melayer.run_directory import plain
from melayer.sinks import SinksResult
from melayer.sweep import SweepResult
from melayer.version import __version__

if TYPE_CHECKING:
    from melayer.contrast import ContrastResult
    from melayer.evaluate import EvalResult
    from melayer.quant_check_result import QuantCheckResult
    from melayer.scan_result import ScanResult
    from melayer.training import TuneResult

_TITLES = {"explain": "Why it is there", "rigidity": "What it makes rigid", "sinks": "What attention does with it"}


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    html: Path
    json: Path


def check_writable(out: Path) -> None:
    """Make the directory `out` if it is missing, and raise OutputError unless a file can be written in it.

    Meant to be called before the measurement, so that nobody waits for a report that has no place to go.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OutputError(
            f"The report cannot be written to {out}: {error.strerror}. Give another directory with --out."
        ) from error


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
        if given is not None and given.model.fingerprint != result.model.fingerprint:
            raise InputError(
                f"The {type(given).__name__} is of another model (fingerprint {given.model.fingerprint}) than the "
                f"LocateResult ({result.model.fingerprint}). Give results of one model."
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
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
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


def write_eval_report(result: EvalResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes an evaluation's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `evaluate`, `select` or `compare_runs` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    shared = result.settings["shared"]
    runs = shared.get("runs") or {"": shared}
    facts = []
    for name, run in runs.items():
        model = run["model"]
        facts += [
            (f"Model {name}".strip(), f"{model['name']}, {model['dtype']}, fingerprint {model['fingerprint']}"),
            ("Asked", "through the chat template" if run["chat"] else "as plain text, without a chat template"),
            ("Items at once, device", f"{run['batch_size']}, {run['device']}"),
            ("Versions", ", ".join(f"{what} {number}" for what, number in run["versions"].items())),
        ]
    for task, about in result.settings["tasks"].items():
        versions_of = sorted(set(about["lm_eval_tasks"].values()))
        source = ", ".join(f"{file} {sha[:12]}" for file, sha in about["data_sha256"].items()) or "the hub"
        facts.append((task, f"{about['cite']}; lm-eval task version {', '.join(versions_of)}; items from {source}"))
    name = ", ".join(dict.fromkeys(run["model"]["name"] for run in runs.values()))
    values = {"evaluation": result.to_dict()}
    return _one_section(out, evaluate_section(result), name, result.notes, facts, values, command)


def write_tune_report(
    result: TuneResult, history: Sequence[Mapping[str, Any]], *, command: str | None = None
) -> Written:
    """Writes a training run's `report.html` and `report.json` into its directory; each appears whole or not at all.

    Args:
        result: What `sft`, `dpo` or `grpo` did.
        history: The lines of its log.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: The directory cannot be written.
    """
    out = Path(result.out)
    check_writable(out)
    model, data = result.model, result.settings["data"]
    mask = "none"
    if result.mask is not None:
        layers = result.mask.layers or ()
        mask = f"{result.mask.selector} {result.mask.rate:g}, strength {result.mask.strength:g}, blocks "
        mask += ", ".join(map(str, layers))
    facts = [
        ("Model that training began with", f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}"),
        ("Mask", mask),
        ("Reference", result.reference or "none"),
        ("Trained", "a LoRA adapter" if result.adapter else "all weights"),
        ("Data", f"{data['source']}: {data['rows']} rows, sha256 {data['sha256'][:12]}"),
        ("Versions", ", ".join(f"{what} {number}" for what, number in result.versions.items())),
    ]
    name, values = f"{result.method} on {model.name}", {"tune": plain(result.to_dict()), "log": list(history)}
    return _one_section(out, tune_section(result, history), name, result.notes, facts, values, command)


def write_contrast_report(result: ContrastResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes a comparison's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `contrast` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    facts = [
        (side, f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}")
        for side, model in (("Before", result.before.located.model), ("After", result.after.located.model))
    ]
    located = result.before.located
    facts += [
        ("Texts", f"{located.settings['texts']}: {located.settings['n_sequences']} texts, the same for both"),
        ("Sinks", f"T = {result.T}"),
        ("Versions", ", ".join(f"{what} {number}" for what, number in versions().items())),
    ]
    name = f"{result.before.located.model.name} and {result.after.located.model.name}"
    values = {"contrast": result.to_dict()}
    return _one_section(out, contrast_section(result), name, result.notes, facts, values, command)


def write_scan_report(result: ScanResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes a scan's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `scan` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    model, settings, total = result.model, result.settings, result.total
    data = settings["data"]
    size = f", {data['bytes']:,} bytes" if "bytes" in data else f", split {data['split']}"
    size += f" in {data['files']:,} files" if "files" in data else ""
    facts = [
        ("Model", f"{model.name} ({model.family}, {model.n_layers} blocks, d_model {model.d_model}), {model.dtype}"),
        ("Fingerprint of the weights", model.fingerprint),
        ("Corpus", f"{data['source']}{size}: {total.documents:,} documents, {total.tokens:,} tokens"),
        ("Sequences", f"{total.sequences:,} of at most {settings['max_tokens']} tokens"),
        ("Mask", settings["mask"] or "none"),
        ("Time", f"{result.seconds:,.0f} s in {result.n_processes} process{'es' * (result.n_processes > 1)}"),
        ("Counting", "blocks, tokens, dimensions and documents from 0"),
        ("Versions", ", ".join(f"{what} {number}" for what, number in versions().items())),
    ]
    return _one_section(out, scan_section(result), model.name, result.notes, facts, {"scan": result.to_dict()}, command)


def write_quant_report(result: QuantCheckResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes a quantisation check's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `quant_check` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    model, settings = result.model, result.settings
    mask = settings["mask"]
    shown = "none" if mask is None else f"{mask['selector']} {mask['rate']:g}, strength {mask['strength']:g}"
    facts = [
        ("Model", f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}"),
        ("Texts", f"{settings['texts']}: {result.n_sequences} sequences of T = {result.T}"),
        ("Calibration", f"{settings['calibration']}: {result.n_calibration} sequences"),
        ("Prefix", f"{list(result.prefix.ids)}"),
        ("Mask", shown),
        ("Left as it is", settings["left_unquantised"]),
        ("Versions", ", ".join(f"{what} {number}" for what, number in versions().items())),
    ]
    values = {"quant_check": result.to_dict()}
    return _one_section(out, quant_check_section(result), model.name, result.notes, facts, values, command)


def _one_section(
    out: Path,
    section: Section,
    name: str,
    notes: Sequence[str],
    facts: list[tuple[str, str]],
    values: dict[str, Any],
    command: str | None,
) -> Written:
    """A page of one section, with when and by which command it was made."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    facts = [*facts, ("Made", date), *([("Command", command)] if command else [])]
    provenance = {"date": date, "command": command}
    page = render([section], name, notes, facts)
    return _write(out, page, {"melayer_version": __version__, "provenance": provenance, **values})


def _write(out: Path, page: str, values: dict[str, Any]) -> Written:
    written = Written(out / "report.html", out / "report.json")
    _replace(written.json, json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False))
    _replace(written.html, page)
    return written


def render(sections: list[Section], name: str, notes: Sequence[str], facts: list[tuple[str, str]]) -> str:
    """The page as text. Whatever comes from a model or a user is escaped by the template."""
    import jinja2
    from plotly.offline import get_plotlyjs

    templates = files("melayer.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["plot"] = lambda part: isinstance(part, Plot)
    plots = {part.key: part.figure for section in sections for part in section.parts if isinstance(part, Plot)}
    template = environment.from_string((templates / "report.html").read_text(encoding="utf-8"))
    return template.render(
        sections=sections,
        name=name,
        notes=notes,
        facts=facts,
        # `<` never appears as itself inside a script, so that no text can close it.
        figures=json.dumps(plots, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=(templates / "report.js").read_text(encoding="utf-8"),
    )


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


def _replace(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Free some space or give another directory with --out."
        ) from error
