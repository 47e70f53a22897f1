"""The report's section on what quantised activations cost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from melayer.model.provenance import versions
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, GREY, ORANGE, VERMILLION, Trace, axis, hover, label, stroke
from melayer.presentation.numbers import ABSENT, rounded
from melayer.presentation.page import Page, Written, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table
from melayer.quantisation.result import QuantCheckResult, Setting, shown
from melayer.quantisation.treatments import TREATMENTS, Treatment

_COLOURS = dict(zip(TREATMENTS, (GREY, BLUE, ORANGE, VERMILLION), strict=True))


def write_quant_report(result: QuantCheckResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes a quantisation check's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `quant_check` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    model, settings = result.model, result.settings
    mask = settings["mask"]
    facts = [
        ("Model", f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}"),
        ("Texts", f"{settings['texts']}: {result.n_sequences} sequences of T = {result.T}"),
        ("Calibration", f"{settings['calibration']}: {result.n_calibration} sequences"),
        ("Prefix", f"{list(result.prefix.ids)}"),
        ("Mask", f"{mask['selector']} {mask['rate']:g}, strength {mask['strength']:g}" if mask else "none"),
        ("Left as it is", settings["left_unquantised"]),
        versions_fact(versions()),
    ]
    page = Page(model.name, [section(result)], result.notes, facts, {"quant_check": result.to_dict()})
    return write_page(page, out, command=command)


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
    bars = [_bar(result, format, treatment) for format in formats for treatment in treatments]
    base = result.unquantised.perplexity
    unquantised = [] if base is None else [figures.horizontal(base, stroke(GREY, dash="dash"))]
    return Plot(
        "quant-perplexity",
        "Perplexity by format, scales and treatment",
        _bars_takeaway(result),
        f"Lower is better; the dashed line is the unquantised model ({shown(base)}). The menu chooses the format, and "
        f"the axis follows. Every bar predicts the same {result.n_predicted:,} tokens of {result.n_sequences} "
        "sequences; its whisker is the interval of the cost against the unquantised model. baked: the prefix in full "
        "precision and left out of calibration; mask: part of the massive token taken away where attention reads.",
        figures.figure(
            figures.first_shown(bars, len(treatments)),
            None,
            axis("perplexity", rangemode="tozero"),
            {"barmode": "group", "shapes": unquantised},
            figures.menu(formats, len(treatments)) if len(formats) > 1 else {"updatemenus": []},
        ),
    )


def _bar(result: QuantCheckResult, format: str, treatment: Treatment) -> Trace:
    rows = [row for row in result.rows if (row.format, row.treatment) == (format, treatment)]
    heights = [math.nan if row.score.perplexity is None else row.score.perplexity for row in rows]
    ends = [_ends(result, row) for row in rows]
    bars = figures.bar(
        [row.granularity for row in rows],
        rounded(heights, 5),
        _COLOURS[treatment],
        name=treatment,
        template=hover(f"{format} %{{x}}, {treatment}: %{{y}}"),
    )
    up = [high - at for at, (_, high) in zip(heights, ends, strict=True)]
    down = [at - low for at, (low, _) in zip(heights, ends, strict=True)]
    return bars | {"error_y": figures.whiskers(rounded(up, 5), rounded(down, 5), thickness=1)}


def _bars_takeaway(result: QuantCheckResult) -> str:
    first = result.rows[0]
    changes = [of for of in result.changes if (of.format, of.granularity) == (first.format, first.granularity)]
    verdicts = "; ".join(f"{of.what}: {of.verdict} ({of.by.value:+.3f})" for of in changes)
    cost = "" if first.cost is None else f" costs {first.cost.value:+.3f} nats a token"
    return f"{first.label}{cost}" + (f"; {verdicts}." if verdicts else ".")


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
        ends = ABSENT if by.low is None else f"{by.low:+.3f} to {by.high:+.3f}"
        rows.append([change.format, change.granularity, change.what, f"{by.value:+.3f}", ends, change.verdict])
    return Table(
        "What baking and the mask change (each interval stands alone: of twenty one leaves out 0 by chance)",
        ["format", "scales", "what", "nats a token", "interval", ""],
        rows,
    )


def _errors(result: QuantCheckResult) -> Plot:
    maps = [_error_map(result, row) for row in result.rows]
    first = result.rows[0]
    worst = ", ".join(f"{at.label} ({value:.1%})" for at, value in result.worst(first))
    return Plot(
        "quant-errors",
        "Relative error of every linear input",
        f"With {first.label} the worst are {worst}.",
        "The menu chooses the setting. Each square is what one linear map reads (or several that read the same, named "
        "by the first): the size of the rounding error against that of the activations, over ordinary tokens; brighter "
        "is worse, in the setting's own range, and at 100 % nothing of them is left.",
        figures.figure(
            figures.first_shown(maps),
            None,
            axis(BLOCK, autorange="reversed"),
            figures.height(result.model.n_layers, 13, beside=160, least=400),
            figures.menu([row.label for row in result.rows]),
        ),
    )


def _error_map(result: QuantCheckResult, row: Setting) -> Trace:
    """The errors of one setting in percent, block by linear map."""
    places = list(dict.fromkeys(at.paths for at in result.inputs))
    grid = np.full((result.model.n_layers, len(places)), math.nan)
    for at, error in zip(result.inputs, row.error, strict=True):
        grid[at.layer, places.index(at.paths)] = math.nan if error is None else 100 * error
    return figures.heat_map(
        rounded(grid, 3),
        "%",
        x=[label(paths[0]) for paths in places],
        limits=(0, None),
        template=hover(f"{row.label}, block %{{y}}, %{{x}}: %{{z}} %"),
    )


def _figures(result: QuantCheckResult) -> Table:
    rows = []
    for row in result.rows:
        cost = ABSENT if row.cost is None else f"{row.cost.value:+.4f}"
        ends = ABSENT if row.cost is None or row.cost.low is None else f"{row.cost.low:+.4f} to {row.cost.high:+.4f}"
        worst = "; ".join(f"{at.label} {value:.1%}" for at, value in result.worst(row))
        rows.append([row.format, row.granularity, row.treatment, shown(row.score.perplexity), cost, ends, worst])
    return Table(
        "The figures of every setting",
        ["format", "scales", "treatment", "perplexity", "cost, nats a token", "interval", "worst sites"],
        rows,
        folded=True,
    )
