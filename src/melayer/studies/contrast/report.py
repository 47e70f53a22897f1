"""The report's section on two models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.model.provenance import versions
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, VERMILLION, axis, hover, stroke
from melayer.presentation.numbers import ABSENT, number, rounded
from melayer.presentation.page import Page, Written, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table

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
            axis("largest |h|", type="log"),
        ),
        _plot(
            "contrast-sinks",
            "Sink rate by block",
            result.sentence,
            f"The share of heads and sequences (T = {result.T}) in which key 0 draws more than "
            f"{result.before.sinks.epsilon:g} of the attention.",
            rates,
            axis("%", range=[0, 102]),
        ),
        _plot(
            "contrast-cosine",
            "Cosine of the massive token's state with its state one block later",
            _cosine_takeaway(result),
            "1 is the same direction: a stretch of ones is where nothing about the token changes.",
            cosines,
            axis("cosine"),
        ),
        Table("The figures", ["", "before", "after"], [_row(figure) for figure in result.figures]),
    ]
    return Section("contrast", "Before and after", result.sentence, parts)


def _cosine_takeaway(result: ContrastResult) -> str:
    values = [side.rigid for side in (result.before, result.after)]
    if values[0] is None or values[1] is None:
        return "One of the two has no ME layer, so there is no stretch to compare."
    return f"From the ME layer until the state is erased it is at least {values[0]:.4f} before, {values[1]:.4f} after."


def _row(figure: Figure) -> list[str]:
    return [figure.name, *(side_text(figure, value, ABSENT) for value in (figure.before, figure.after))]


def side_text(figure: Figure, value: float | int | str | None, absent: str) -> str:
    """One side's value of a figure, for a table."""
    if isinstance(value, float):
        return number(value, 0 if figure.name == "largest |h|" else 4)
    return absent if value is None else str(value)


def _plot(
    key: str, title: str, takeaway: str, reading: str, values: Sequence[Sequence[float | None]], unit: dict[str, Any]
) -> Plot:
    styles = {"before": stroke(BLUE, dash="dash"), "after": stroke(VERMILLION, dash="solid")}
    data = [
        figures.line(name, range(len(row)), rounded(row, 5), style, template=hover(f"{name}, block %{{x}}: %{{y}}"))
        for (name, style), row in zip(styles.items(), values, strict=True)
    ]
    return Plot(key, title, takeaway, reading, figures.figure(data, axis(BLOCK), unit))


def write_contrast_report(result: ContrastResult, out: str | Path, *, command: str | None = None) -> Written:
    """Writes a comparison's `report.html` and `report.json` into `out`; each appears whole or not at all.

    Args:
        result: What `contrast` found.
        out: A directory; made if it is missing.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: `out` cannot be written.
    """
    located = result.before.located
    models = {"Before": located.model, "After": result.after.located.model}
    facts = [
        *((side, f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}") for side, model in models.items()),
        ("Texts", f"{located.settings['texts']}: {located.settings['n_sequences']} texts, the same for both"),
        ("Sinks", f"T = {result.T}"),
        versions_fact(versions()),
    ]
    name = " and ".join(model.name for model in models.values())
    page = Page(name, [section(result)], result.notes, facts, {"contrast": result.to_dict()})
    return write_page(page, out, command=command)
