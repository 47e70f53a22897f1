"""How tests look at what is shown: a terminal's text, a section on its page."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from hand_made import HOSTILE
from melayer.presentation.page import Page, render
from melayer.presentation.sections import Plot, Section, Table


def printed(show: Callable[..., None], *shown: Any, width: int = 100) -> str:
    """What a table's function prints into a terminal without colours, without blanks at the ends of lines."""
    file = io.StringIO()
    show(*shown, Console(file=file, width=width))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def page(section: Section) -> str:
    """The section as it stands on a page, without plotly.js and the rest around it."""
    html = render(Page(HOSTILE, [section], (), (), {}), ())
    return html.partition("<main>")[2].partition('<section id="provenance">')[0]


def checked(section: Section) -> dict[str, Plot | Table]:
    """The parts by key or title, after what holds for every section of every report."""
    plots = [part for part in section.parts if isinstance(part, Plot)]
    assert len({plot.key for plot in plots}) == len(plots)
    for plot in plots:
        assert plot.title
        assert plot.reading
        assert plot.takeaway.endswith(".")
        assert set(plot.figure) == {"data", "layout"}
        assert plot.figure["data"]
        assert "<b>" not in json.dumps(plot.figure, allow_nan=False)
    for part in section.parts:
        if isinstance(part, Table):
            assert all(len(row) == len(part.columns) for row in part.rows), part.title
    html = page(section)
    assert "<b>" not in html
    assert section.answer
    return {part.key if isinstance(part, Plot) else part.title: part for part in section.parts}
