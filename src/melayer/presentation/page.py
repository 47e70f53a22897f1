"""One HTML file that works offline, and the same results as JSON beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import OutputError
from melayer.presentation.sections import Plot, Section
from melayer.version import __version__

if TYPE_CHECKING:
    pass


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
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
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

    templates = files("melayer.presentation") / "templates"
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
