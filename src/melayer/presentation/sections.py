"""What a report is made of: sections of plots and tables, each with its computed takeaway and how to read it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Colours of Okabe and Ito (2008), darkened or lightened until they stand out on white and on near-black.
BLUE, ORANGE, VERMILLION, GREY = "#2a86c8", "#e08a00", "#d55e00", "#8a8a8a"
SEQUENTIAL = "Cividis"  # even steps of lightness, the same for every kind of colour vision


@dataclass(frozen=True)
class Plot:
    """One plotly figure with its words."""

    key: str
    """Its id in the page."""
    title: str
    takeaway: str
    reading: str
    figure: dict[str, Any]
    """`data` and `layout`, as plotly.js takes them; colours of text, grid and background come from the page."""


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


def label(text: str) -> str:
    """Text for a plotly label, where `<b>` and `&lt;` would be markup."""
    return html.escape(text, quote=False)


def rounded(values: NDArray[Any], digits: int = 4) -> list[Any]:
    """Numbers for the page with this many significant digits, so that it stays small; NaN becomes null."""
    flat = [
        None if not np.isfinite(value) else float(f"{value:.{digits - 1}e}") for value in np.asarray(values).ravel()
    ]
    shape = np.shape(values)
    nested: list[Any] = np.array(flat, dtype=object).reshape(shape).tolist()
    return nested


def number(value: float | None, digits: int = 0) -> str:
    """A number for a table."""
    return "—" if value is None else f"{value:,.{digits}f}"
