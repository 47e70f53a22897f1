"""The report's section on two models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.model.provenance import versions
from melayer.presentation import figures
from melayer.presentation.figures import BLOCK, BLUE, VERMILLION, axis, hover, stroke
from melayer.presentation.numbers import ABSENT, number, rounded
from melayer.presentation.page import Page, Written, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table

if TYPE_CHECKING:
    from melayer.studies.contrast.result import ContrastResult, Figure, Measured, Value


_STYLES = {
    "before": stroke(BLUE, dash="dash"),
    "before, masked": stroke(BLUE, dash="dot", width=1),
    "after": stroke(VERMILLION, dash="solid"),
    "after, masked": stroke(VERMILLION, dash="dot", width=1),
}


def section(result: ContrastResult) -> Section:
    """The largest magnitudes, the sinks and the cosines of all that were measured, and the figures."""
    sides = result.columns
    magnitudes = {name: [row.max_abs for row in side.located.blocks] for name, side in sides.items()}
    rates = {
        name: [None if rate is None else 100 * rate for rate in side.sinks.rate_by_layer]
        for name, side in sides.items()
    }
    cosines = {name: list(side.rigidity.cosine_next) for name, side in sides.items()}
    parts: list[Plot | Table] = [
        _plot(
            "contrast-magnitude",
            "Largest magnitude by block",
            f"It was {_largest(result.before)} and is {_largest(result.after)}.",
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
        Table("The figures", ["", *columns_of(result)], [_row(result, figure) for figure in result.figures]),
    ]
    return Section("contrast", "Before and after", result.sentence, parts)


def _largest(side: Measured) -> str:
    value, block, dim = side.largest
    return "not finite anywhere" if value is None else f"{number(value)} (block {block}, dimension {dim})"


def _cosine_takeaway(result: ContrastResult) -> str:
    values = [side.rigid for side in (result.before, result.after)]
    if values[0] is None or values[1] is None:
        return "One of the two has no ME layer, so there is no stretch to compare."
    return f"From the ME layer until the state is erased it is at least {values[0]:.4f} before, {values[1]:.4f} after."


def columns_of(result: ContrastResult) -> list[str]:
    """The columns of the figures: what was measured, and where there is a mask the change and whose it is."""
    split = [] if result.after_masked is None else ["by training", "by the mask", "by both"]
    return [*result.columns, *split]


def cells_of(result: ContrastResult, figure: Figure, absent: str) -> list[str]:
    """One figure's cells in these columns."""
    values = {
        "before": figure.before,
        "before, masked": figure.before_masked,
        "after": figure.after,
        "after, masked": figure.after_masked,
    }
    cells = [side_text(figure, values[name], absent) for name in result.columns]
    if result.after_masked is None:
        return cells
    split = (figure.training, figure.masking, figure.interaction)
    return [*cells, *(absent if part is None else _signed(side_text(figure, part, absent)) for part in split)]


def _signed(written: str) -> str:
    return written if written.startswith("-") or not any(digit in written for digit in "123456789") else f"+{written}"


def _row(result: ContrastResult, figure: Figure) -> list[str]:
    return [figure.name, *cells_of(result, figure, ABSENT)]


def side_text(figure: Figure, value: Value, absent: str) -> str:
    """One side's value of a figure, for a table."""
    if isinstance(value, float):
        return number(value, 0 if figure.name == "largest |h|" else 4, absent=absent)
    return absent if value is None else str(value)


def _plot(
    key: str,
    title: str,
    takeaway: str,
    reading: str,
    values: Mapping[str, Sequence[float | None]],
    unit: dict[str, Any],
) -> Plot:
    data = [
        figures.line(
            name, range(len(row)), rounded(row, 5), _STYLES[name], template=hover(f"{name}, block %{{x}}: %{{y}}")
        )
        for name, row in values.items()
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
        *_mask_fact(result),
        versions_fact(versions()),
    ]
    name = " and ".join(model.name for model in models.values())
    page = Page(name, [section(result)], result.notes, facts, {"contrast": result.to_dict()})
    return write_page(page, out, command=command)


def _mask_fact(result: ContrastResult) -> Iterator[tuple[str, str]]:
    mask = None if result.after_masked is None else result.after_masked.mask
    if mask is not None:
        blocks = "all after the ME layer" if mask.layers is None else ", ".join(map(str, mask.layers))
        yield "Mask", f"{mask.selector} {mask.rate:g}, strength {mask.strength:g}; blocks: {blocks}"
