"""Figures as plotly.js takes them: traces, axes, what marks a place, menus.

Numbers come ready for the page (`numbers.rounded`). Text that is not our own goes through `label` where it stands on
an axis or in a hover text. Colours of text, grid and background come from the page, so that one figure serves both
light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

# Colours of Okabe and Ito (2008), darkened or lightened until they stand out on white and on near-black.
BLUE, ORANGE, VERMILLION, GREY = "#2a86c8", "#e08a00", "#d55e00", "#8a8a8a"
SEQUENTIAL = "Cividis"  # even steps of lightness, the same for every kind of colour vision

BLOCK = "block (0-based)"
"""The title of an axis on which blocks are counted."""

Trace = dict[str, Any]


def label(text: str) -> str:
    """Text for a plotly label, where `<b>` and `&lt;` would be markup."""
    return html.escape(text, quote=False)


# --- traces ---------------------------------------------------------------------------------------------------------


def stroke(colour: str, *, dash: str | None = None, width: float | None = 2) -> dict[str, Any]:
    """How a line is drawn; what is None is left to plotly.js, which draws a solid line of 2 pixels."""
    return {"color": colour} | _given(dash=dash, width=width)


def hover(text: str, name: str = "") -> str:
    """A template of what is shown at a point, with a name beside its box."""
    return f"{text}<extra>{label(name)}</extra>"


def line(
    name: str,
    x: Sequence[Any],
    y: Sequence[float | None],
    style: Mapping[str, Any],
    *,
    marker: float | None = 5,
    template: str | None = None,
) -> Trace:
    """A curve through points.

    Args:
        name: What the legend says.
        x: Where the points are.
        y: Their values; the curve has a gap where there is none.
        style: A `stroke`.
        marker: The size of a point; None for a line without points.
        template: What is shown at a point, a `hover`.
    """
    trace = {
        "type": "scatter",
        "mode": "lines" if marker is None else "lines+markers",
        "name": label(name),
        "x": list(x),
        "y": list(y),
        "line": dict(style),
    }
    return trace | _given(marker=None if marker is None else {"size": marker}, hovertemplate=template)


def points(x: Sequence[Any], y: Sequence[Any], marker: Mapping[str, Any], *, template: str) -> Trace:
    """Points that no line joins."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "marker": dict(marker),
        "hovertemplate": template,
    }


def bar(x: Sequence[Any], y: Sequence[Any], colour: str, *, template: str, name: str | None = None) -> Trace:
    """Bars of one colour; upright unless `orientation` is added."""
    trace = {
        "type": "bar",
        "x": list(x),
        "y": list(y),
        "marker": {"color": colour},
        "hovertemplate": template,
    }
    return trace | _given(name=None if name is None else label(name))


def whiskers(up: Sequence[float | None], down: Sequence[float | None], **style: Any) -> dict[str, Any]:
    """Error bars that reach so far up and down from the values."""
    return {"type": "data", "symmetric": False, "array": list(up), "arrayminus": list(down), **style}


def heat_map(
    z: Sequence[Sequence[float | None]],
    unit: str,
    *,
    template: str,
    x: Sequence[Any] | None = None,
    y: Sequence[Any] | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    thickness: float | None = 12,
) -> Trace:
    """A map of colours.

    Args:
        z: The values, [rows, columns]; a square without one stays empty.
        unit: The title of the colour bar.
        template: What is shown at a square, a `hover`.
        x: The columns' names; by default they are counted from 0.
        y: The rows' names.
        limits: The values of the darkest and the brightest colour; by default the smallest and the largest of z.
        thickness: Of the colour bar, in pixels.
    """
    trace = {
        "type": "heatmap",
        "z": z,
        "colorscale": SEQUENTIAL,
        "colorbar": {"title": {"text": unit}} | _given(thickness=thickness),
        "hovertemplate": template,
    }
    return trace | _given(x=x, y=y, zmin=limits[0], zmax=limits[1])


def surface(x: Sequence[Any], y: Sequence[Any], z: Sequence[Sequence[float | None]], *, template: str) -> Trace:
    """A landscape in three dimensions, over the rectangle of x and y."""
    return {
        "type": "surface",
        "x": list(x),
        "y": list(y),
        "z": z,
        "colorscale": SEQUENTIAL,
        "showscale": False,
        "hovertemplate": template,
    }


def waterfall(steps: Sequence[str], values: Sequence[float | None], *, template: str) -> Trace:
    """Bars that each begin where the one before ends; the last one is their sum."""
    return {
        "type": "waterfall",
        "x": list(steps),
        "y": list(values),
        "measure": [*["relative"] * (len(steps) - 1), "total"],
        "hovertemplate": template,
        "increasing": {"marker": {"color": VERMILLION}},
        "decreasing": {"marker": {"color": BLUE}},
        "totals": {"marker": {"color": GREY}},
        "connector": {"line": stroke(GREY, width=1)},
    }


# --- the layout -----------------------------------------------------------------------------------------------------


def figure(
    data: Sequence[Trace], x: dict[str, Any] | None, y: dict[str, Any], *layout: dict[str, Any]
) -> dict[str, Any]:
    """Traces with their axes and whatever else the layout has."""
    whole: dict[str, Any] = ({} if x is None else {"xaxis": x}) | {"yaxis": y}
    for part in layout:
        whole |= part
    return {"data": list(data), "layout": whole}


def scene(data: Sequence[Trace], x: dict[str, Any], y: dict[str, Any], z: dict[str, Any]) -> dict[str, Any]:
    """Traces in three dimensions, with buttons that make the vertical axis linear or logarithmic."""
    buttons = [
        {"label": kind, "method": "relayout", "args": [{"scene.zaxis.type": kind}]} for kind in ("linear", "log")
    ]
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top"}
    view = {"eye": {"x": -1.3, "y": -1.7, "z": 0.9}, "center": {"x": 0, "y": 0, "z": -0.15}}
    shape = {"aspectratio": {"x": 1.6, "y": 1.2, "z": 0.8}, "camera": view}
    layout = {
        "height": 520,
        "margin": {"l": 0, "r": 0, "t": 10, "b": 0},
        "scene": {"xaxis": x, "yaxis": y, "zaxis": z, **shape},
        "updatemenus": [
            {"type": "buttons", "direction": "right", "showactive": False, **place, "buttons": buttons},
        ],
    }
    return {"data": list(data), "layout": layout}


def axis(title: str | None = None, **options: Any) -> dict[str, Any]:
    """An axis with its title (and the unit in it), and other options of plotly's."""
    return ({} if title is None else {"title": {"text": title}}) | options


def height(n_rows: int, each: int, *, beside: int, least: int) -> dict[str, Any]:
    """As high as so many rows need, in pixels, with what is beside them."""
    return {"height": max(least, beside + each * n_rows)}


def vertical(at: float, style: Mapping[str, Any]) -> dict[str, Any]:
    """A line from the bottom to the top."""
    return {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": dict(style)}


def horizontal(at: float, style: Mapping[str, Any]) -> dict[str, Any]:
    """A line from the left to the right."""
    return {"type": "line", "y0": at, "y1": at, "xref": "paper", "x0": 0, "x1": 1, "line": dict(style)}


def marked(at: float | None, text: str) -> dict[str, Any]:
    """A layout with a vertical line that is named at its top; without one where there is no place."""
    if at is None:
        return {"shapes": [], "annotations": []}
    name = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "text": text, "showarrow": False}
    return {"shapes": [vertical(at, stroke(ORANGE))], "annotations": [name | {"font": {"color": ORANGE}}]}


# --- several pictures in one place ----------------------------------------------------------------------------------


def menu(names: Sequence[str], each: int = 1) -> dict[str, Any]:
    """A layout with a menu that shows one group of traces.

    Args:
        names: The groups, in the order of their traces.
        each: How many traces a group has.
    """
    buttons = [
        {
            "label": label(name),
            "method": "restyle",
            "args": [{"visible": [other == place for other in range(len(names)) for _ in range(each)]}],
        }
        for place, name in enumerate(names)
    ]
    corner = {"x": 0, "xanchor": "left", "y": 1.06, "yanchor": "bottom"}
    return {"updatemenus": [{"type": "dropdown", "buttons": buttons, "active": 0, **corner}]}


def first_shown(traces: Sequence[Trace], each: int = 1) -> list[Trace]:
    """The traces of a `menu` as the page opens: those of the first group are seen."""
    return [{**trace, "visible": place < each} for place, trace in enumerate(traces)]


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
