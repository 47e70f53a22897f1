"""The report's section on what quantised activations cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from melayer.model.provenance import versions
from melayer.presentation.page import Written, _one_section, check_writable
from melayer.presentation.sections import (
    BLUE,
    GREY,
    ORANGE,
    SEQUENTIAL,
    VERMILLION,
    Plot,
    Section,
    Table,
    label,
    rounded,
)
from melayer.quantisation.result import QuantCheckResult, Setting, shown
from melayer.quantisation.treatments import TREATMENTS

if TYPE_CHECKING:
    from melayer.quantisation.result import QuantCheckResult


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
    return _one_section(out, section(result), model.name, result.notes, facts, values, command)


_COLOURS = dict(zip(TREATMENTS, (GREY, BLUE, ORANGE, VERMILLION), strict=True))


def section(result: QuantCheckResult) -> Section:
    """Bars of the perplexity by format, what the treatments change, a map of the errors by setting, and all figures."""
    return Section(
        "quant-check",
        "What quantised activations cost",
        result.sentence,
        [_bars(result), *([_changes(result)] if result.changes else []), _errors(result), _figures(result)],
    )


def _bars(result: QuantCheckResult) -> Plot:
    formats, treatments = result.settings["formats"], result.settings["treatments"]
    data: list[dict[str, Any]] = []
    for format in formats:
        for treatment in treatments:
            rows = [row for row in result.rows if (row.format, row.treatment) == (format, treatment)]
            heights = np.array([math.nan if (p := row.score.perplexity) is None else p for row in rows])
            ends = np.array([_ends(result, row) for row in rows])
            data.append(
                {
                    "type": "bar",
                    "name": treatment,
                    "x": [row.granularity for row in rows],
                    "y": rounded(heights, 5),
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": rounded(ends[:, 1] - heights, 5),
                        "arrayminus": rounded(heights - ends[:, 0], 5),
                        "thickness": 1,
                    },
                    "marker": {"color": _COLOURS[treatment]},
                    "visible": format == formats[0],
                    "hovertemplate": f"{format} %{{x}}, {treatment}: %{{y}}<extra></extra>",
                }
            )
    base = result.unquantised.perplexity
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base, "y1": base}
    buttons = [
        {
            "label": format,
            "method": "restyle",
            "args": [{"visible": [other == format for other in formats for _ in treatments]}],
        }
        for format in formats
    ]
    menu = {
        "type": "dropdown",
        "buttons": buttons,
        "active": 0,
        "x": 0,
        "xanchor": "left",
        "y": 1.06,
        "yanchor": "bottom",
    }
    first = result.rows[0]
    changes = [of for of in result.changes if (of.format, of.granularity) == (first.format, first.granularity)]
    found = "; ".join(f"{of.what}: {of.verdict} ({of.by.value:+.3f})" for of in changes)
    cost = "" if first.cost is None else f" costs {first.cost.value:+.3f} nats a token"
    return Plot(
        "quant-perplexity",
        "Perplexity by format, scales and treatment",
        f"{first.label}{cost}" + (f"; {found}." if found else "."),
        f"Lower is better; the dashed line is the unquantised model ({shown(base)}). The menu chooses the format, and "
        f"the axis follows. Every bar predicts the same {result.n_predicted:,} tokens of {result.n_sequences} "
        "sequences; its whisker is the interval of the cost against the unquantised model. baked: the prefix in full "
        "precision and left out of calibration; mask: part of the massive token taken away where attention reads.",
        {
            "data": data,
            "layout": {
                "barmode": "group",
                "yaxis": {"title": {"text": "perplexity"}, "rangemode": "tozero"},
                "shapes": [{**line, "line": {"color": GREY, "width": 2, "dash": "dash"}}],
                "updatemenus": [menu | {"y": 1.06, "yanchor": "bottom"}] if len(formats) > 1 else [],
            },
        },
    )


def _ends(result: QuantCheckResult, row: Setting) -> tuple[float, float]:
    """The perplexities at the ends of the interval of the cost."""
    base, cost = result.unquantised.nll, row.cost
    if base is None or cost is None or cost.low is None or cost.high is None or base + cost.high > 700:
        return math.nan, math.nan
    return math.exp(base + cost.low), math.exp(base + cost.high)


def _changes(result: QuantCheckResult) -> Table:
    rows = []
    for change in result.changes:
        by = change.by
        ends = "—" if by.low is None else f"{by.low:+.3f} to {by.high:+.3f}"
        rows.append([change.format, change.granularity, change.what, f"{by.value:+.3f}", ends, change.verdict])
    return Table(
        "What baking and the mask change (each interval stands alone: of twenty one leaves out 0 by chance)",
        ["format", "scales", "what", "nats a token", "interval", ""],
        rows,
    )


def _errors(result: QuantCheckResult) -> Plot:
    places = list(dict.fromkeys(row.paths for row in result.inputs))
    column = {paths: place for place, paths in enumerate(places)}
    traces = []
    for at, row in enumerate(result.rows):
        grid = np.full((result.model.n_layers, len(places)), math.nan)
        for of, value in zip(result.inputs, row.error, strict=True):
            grid[of.layer, column[of.paths]] = math.nan if value is None else 100 * value
        traces.append(
            {
                "type": "heatmap",
                "z": rounded(grid, 3),
                "x": [label(paths[0]) for paths in places],
                "zmin": 0,
                "colorscale": SEQUENTIAL,
                "colorbar": {"title": {"text": "%"}, "thickness": 12},
                "visible": at == 0,
                "hovertemplate": f"{row.label}, block %{{y}}, %{{x}}: %{{z}} %<extra></extra>",
            }
        )
    n = len(result.rows)
    buttons = [
        {"label": row.label, "method": "restyle", "args": [{"visible": [other == at for other in range(n)]}]}
        for at, row in enumerate(result.rows)
    ]
    menu = {"type": "dropdown", "buttons": buttons, "active": 0, "x": 0, "xanchor": "left"}
    worst = result.worst(result.rows[0])
    return Plot(
        "quant-errors",
        "Relative error of every linear input",
        f"With {result.rows[0].label} the worst are "
        + ", ".join(f"{at.label} ({value:.1%})" for at, value in worst)
        + ".",
        "The menu chooses the setting. Each square is what one linear map reads (or several that read the same, named "
        "by the first): the size of the rounding error against that of the activations, over ordinary tokens; brighter "
        "is worse, in the setting's own range, and at 100 % nothing of them is left.",
        {
            "data": traces,
            "layout": {
                "yaxis": {"title": {"text": "block (0-based)"}, "autorange": "reversed"},
                "height": max(400, 160 + 13 * result.model.n_layers),
                "updatemenus": [menu | {"y": 1.06, "yanchor": "bottom"}],
            },
        },
    )


def _figures(result: QuantCheckResult) -> Table:
    rows = []
    for row in result.rows:
        cost = "—" if row.cost is None else f"{row.cost.value:+.4f}"
        ends = "—" if row.cost is None or row.cost.low is None else f"{row.cost.low:+.4f} to {row.cost.high:+.4f}"
        worst = "; ".join(f"{at.label} {value:.1%}" for at, value in result.worst(row))
        rows.append([row.format, row.granularity, row.treatment, shown(row.score.perplexity), cost, ends, worst])
    return Table(
        "The figures of every setting",
        ["format", "scales", "treatment", "perplexity", "cost, nats a token", "interval", "worst sites"],
        rows,
        folded=True,
    )
