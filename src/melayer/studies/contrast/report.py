"""The report's section on two models side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from melayer.model.provenance import versions
from melayer.presentation.page import Written, _one_section, check_writable
from melayer.presentation.sections import BLUE, VERMILLION, Plot, Section, Table, number, rounded

if TYPE_CHECKING:
    from melayer.studies.contrast.result import ContrastResult, Figure


def section(result: ContrastResult) -> Section:
    """The largest magnitudes, the sinks and the cosines of both, and the figures."""
    sides = (result.before, result.after)
    magnitudes = [[row.max_abs for row in side.located.blocks] for side in sides]
    rates = [[None if rate is None else 100 * rate for rate in side.sinks.rate_by_layer] for side in sides]
    cosines = [list(side.rigidity.cosine_next) for side in sides]
    before, after = (side.largest for side in sides)
    parts: list[Plot | Table] = [
        _plot(
            "contrast-magnitude",
            "Largest magnitude by block",
            f"It was {number(before[0])} (block {before[1]}, dimension {before[2]}) and is {number(after[0])} (block "
            f"{after[1]}, dimension {after[2]}).",
            "The largest |h| at each block's output over all texts; the axis is logarithmic.",
            magnitudes,
            {"title": {"text": "largest |h|"}, "type": "log"},
        ),
        _plot(
            "contrast-sinks",
            "Sink rate by block",
            result.sentence,
            f"The share of heads and sequences (T = {result.T}) in which key 0 draws more than "
            f"{result.before.sinks.epsilon:g} of the attention.",
            rates,
            {"title": {"text": "%"}, "range": [0, 102]},
        ),
        _plot(
            "contrast-cosine",
            "Cosine of the massive token's state with its state one block later",
            _cosine_takeaway(result),
            "1 is the same direction: a stretch of ones is where nothing about the token changes.",
            cosines,
            {"title": {"text": "cosine"}},
        ),
        Table("The figures", ["", "before", "after"], [_row(figure) for figure in result.figures]),
    ]
    return Section("contrast", "Before and after", result.sentence, parts)


def _cosine_takeaway(result: ContrastResult) -> str:
    values = [side.rigid for side in (result.before, result.after)]
    if values[0] is None or values[1] is None:
        return "One of the two has no ME layer, so there is no stretch to compare."
    return f"From the ME layer until the state is erased it is at least {values[0]:.4f} before, {values[1]:.4f} after."


def _row(figure: Figure) -> list[Any]:
    digits = 0 if figure.name == "largest |h|" else 4
    return [
        figure.name,
        *(
            number(value, digits) if isinstance(value, float) else "—" if value is None else str(value)
            for value in (figure.before, figure.after)
        ),
    ]


def _plot(
    key: str, title: str, takeaway: str, reading: str, values: Sequence[Sequence[float | None]], axis: dict[str, Any]
) -> Plot:
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(range(len(row))),
            "y": rounded(np.array([math.nan if value is None else value for value in row]), 5),
            "line": {"color": colour, "width": 2, "dash": dash},
            "marker": {"size": 5},
            "hovertemplate": f"{name}, block %{{x}}: %{{y}}<extra></extra>",
        }
        for name, colour, dash, row in zip(
            ("before", "after"), (BLUE, VERMILLION), ("dash", "solid"), values, strict=True
        )
    ]
    layout = {"xaxis": {"title": {"text": "block (0-based)"}}, "yaxis": axis}
    return Plot(key, title, takeaway, reading, {"data": data, "layout": layout})


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
    return _one_section(out, section(result), name, result.notes, facts, values, command)
