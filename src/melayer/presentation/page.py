"""One HTML file that works offline, and the same results as JSON beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from melayer.errors import OutputError, reason
from melayer.presentation.sections import Plot, Section
from melayer.runs import atomic, ours, records
from melayer.runs.json_text import json_text, well_formed
from melayer.version import __version__

Facts = Sequence[tuple[str, str]]
"""What the page says about where its figures come from: what, and what it is."""


@dataclass(frozen=True)
class Page:
    """What one report says."""

    name: str
    """The page's title: as a rule, the model's name."""
    sections: Sequence[Section]
    """At least one; the page opens with the first one's answer."""
    notes: Sequence[str]
    facts: Facts
    """Without when and by which command the page was made, which it says by itself."""
    values: Mapping[str, Any]
    """The results for a program, under their names."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """For a program: what else is known of where the values come from."""


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    html: Path
    json: Path


def files_of(out: Path) -> Written:
    """The files of a report in a directory."""
    return Written(out / "report.html", out / "report.json")


def check_writable(out: Path) -> None:
    """Make the directory `out` if it is missing, and raise OutputError unless a report can be written in it.

    Meant to be called before the measurement, so that nobody waits for a report that has no place to go.

    Raises:
        OutputError: Nothing can be written there, or a file of that name is not melayer's.
    """
    written = files_of(out)
    try:
        atomic.require_writable(out)
        ours.require([written.html, written.json])
    except (OSError, ValueError) as error:
        raise OutputError(
            f"The report cannot be written to {out}: {reason(error)}. Give another directory with --out."
        ) from error


def made_by(out: Path) -> str | None:
    """The command that made the report in a directory; None where there is none, or where no command did.

    Raises:
        OutputError: It cannot be read.
    """
    path = files_of(out).json
    said, todo = f"{path} cannot be read as a report", "Give another directory, or move it away."
    try:
        values = records.read(path, dict[str, Any], said, todo, OutputError)
    except FileNotFoundError:
        return None
    provenance = values.get("provenance")
    command = provenance.get("command") if isinstance(provenance, dict) else None
    return command if isinstance(command, str) else None


def write_page(page: Page, out: str | Path, *, command: str | None = None) -> Written:
    """Writes `report.html` and `report.json` into `out`; both appear, whole, or what was there stays.

    A report of melayer's that is there is replaced; whatever else is at these names stays, and is said.

    Args:
        page: What it says.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    check_writable(out)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    facts = [*page.facts, ("Made", date), *([("Command", command)] if command else [])]
    provenance = {"date": date, "command": command, **page.provenance}
    values = {"melayer_version": __version__, "provenance": provenance, **page.values}
    written = files_of(out)
    texts = {written.json: json_text(values, indent=1), written.html: well_formed(render(page, facts))}
    path = out
    try:
        with atomic.staged(out, last=written.html.name) as place:
            for path, text in texts.items():
                (place / path.name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {reason(error)}. Free some space or give another directory with --out."
        ) from error
    return written


def versions_fact(versions: Mapping[str, str]) -> tuple[str, str]:
    """The fact that names the versions of what a figure depends on."""
    return "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def render(page: Page, facts: Facts) -> str:
    """The page as text, with these facts. Whatever comes from a model or a user is escaped by the template."""
    import jinja2
    from plotly.offline import get_plotlyjs

    templates = files("melayer.presentation") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["plot"] = lambda part: isinstance(part, Plot)
    plots = {part.key: part.figure for section in page.sections for part in section.parts if isinstance(part, Plot)}
    template = environment.from_string((templates / "report.html").read_text(encoding="utf-8"))
    return template.render(
        sections=page.sections,
        name=page.name,
        version=__version__,
        notes=page.notes,
        facts=facts,
        # `<` never appears as itself inside a script, so that no text can close it.
        figures=json_text(plots).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=(templates / "report.js").read_text(encoding="utf-8"),
    )
