"""Answers with and without a mask, side by side at a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from melayer.presentation.tables import print_text
from melayer.studies.answers.result import SIDES

if TYPE_CHECKING:
    from melayer.studies.answers.result import AnswersResult, Side
    from melayer.studies.answers.streaming import Stream


@contextmanager
def live_answers(prompts: list[str], console: Console) -> Iterator[Stream]:
    """Gives what `answers` streams to: the answers grow side by side; the last state is left to `show_answers`."""
    pieces: list[dict[Side, str]] = [{"plain": "", "masked": ""} for _ in prompts]
    place = 0

    with Live(console=console, auto_refresh=False, transient=True) as live:

        def stream(at: int, side: Side, text: str) -> None:
            nonlocal place
            place = at
            pieces[place][side] += text
            live.update(_pair(prompts[place], pieces[place]["plain"], pieces[place]["masked"]), refresh=True)

        yield stream


def show_answers(result: AnswersResult, console: Console) -> None:
    """Prints each prompt with its answers, plain on the left and masked on the right."""
    for answer in result.answers:
        console.print(_pair(answer.prompt, answer.plain, answer.masked))
        at = answer.first_difference
        said = "The answers are the same." if at is None else f"They differ from generated token {at} on (0-based)."
        cut = [side for side in SIDES if getattr(answer, f"{side}_cut")]
        if cut:
            said += f" Cut off at {result.settings['max_new_tokens']} tokens: {' and '.join(cut)}."
        print_text(console, said, style="dim")
    mask, model = result.mask, result.model
    layers = f"every block after {mask.me_layer}" if mask.layers is None else _spans(mask.layers)
    print_text(
        console,
        f"{result.sentence} Mask: {mask.selector} {mask.rate:g}, strength {mask.strength:g}, blocks: {layers} "
        f"(0-based). {model.name}, {model.dtype}, fingerprint {model.fingerprint}.",
        style="dim",
    )


def _pair(prompt: str, plain: str, masked: str) -> Table:
    pair = Table(title=Text(prompt, style="bold"), title_justify="left", expand=True, box=None, padding=(0, 2, 0, 0))
    pair.add_column("plain", ratio=1, overflow="fold")
    pair.add_column("masked", ratio=1, overflow="fold")
    pair.add_row(Text(plain), Text(masked))
    return pair


def _spans(layers: tuple[int, ...]) -> str:
    """Blocks in a row as first-last."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
