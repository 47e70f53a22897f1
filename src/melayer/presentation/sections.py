"""What a report is made of: sections of plots and tables, each with its computed takeaway and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plot:
    """One plotly figure with its words."""

    key: str
    """Its id in the page."""
    title: str
    takeaway: str
    reading: str
    figure: dict[str, Any]
    """`data` and `layout`, as plotly.js takes them; see `figures`."""


@dataclass(frozen=True)
class Table:
    """One table; cells are text or numbers, escaped by the page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    takeaway: str = ""
    folded: bool = False
    prose: bool = False
    """Whether cells hold running text, to be read side by side."""


@dataclass(frozen=True)
class Section:
    """One measurement's part of the page."""

    key: str
    title: str
    answer: str
    """The measurement's answer in one sentence."""
    parts: Sequence[Plot | Table]
