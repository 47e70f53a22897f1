"""The command that shows answers with and without the mask."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from melayer.cli.masks import MaskRequest
from melayer.cli.options import (
    Chat,
    MaskedBlocks,
    MaskRate,
    Model,
    Options,
    Positions,
    Selector,
    Strength,
    System,
    flat,
)
from melayer.cli.output import answer
from melayer.cli.parsing import blocks_of
from melayer.cli.session import load
from melayer.cli.streams import Stdout

commands = typer.Typer()


@commands.command("generate")
@flat
def generate_command(  # noqa: PLR0913 - one parameter an option
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to answer; repeatable.", show_default=False)],
    rate: MaskRate = 0.5,
    strength: Strength = 1.0,
    selector: Selector = "weight",
    layers: MaskedBlocks = None,
    positions: Positions = "first",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 128,
    chat: Chat = None,
    system: System = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, and of selector random.")] = 0,
    *,
    options: Options,
) -> None:
    """Show the answers with and without the mask, side by side.

    The ME layer is located first, on melayer's own texts or those given; with --layers there is no need.

    Example: [bold]melayer generate demo --prompt "Why is the sky blue?" --mask-rate 0.5[/]
    """
    arguments = options.arguments()
    request = MaskRequest(rate, selector, strength, seed, positions, blocks_of("--layers", layers))
    from melayer.numerics.seeds import require_seed
    from melayer.studies.answers.answers import answers
    from melayer.studies.answers.table import live_answers, show_answers

    request.check()
    require_seed(seed)
    loaded = load(model, options.model.loading())
    asking: dict[str, Any] = {
        "mask": request.made(loaded, model, arguments),
        "max_new_tokens": max_new_tokens,
        "chat": chat,
        "system": system,
        "temperature": temperature,
        "seed": seed,
        "name": model,
    }
    terminal = Stdout()
    if terminal.is_terminal and not options.output.as_json:
        with live_answers(prompt, terminal) as stream:
            result = answers(loaded.model, loaded.tokenizer, prompt, **asking, stream=stream)
    else:
        result = answers(loaded.model, loaded.tokenizer, prompt, **asking)
    answer(options.output.as_json, result.to_dict, lambda to: show_answers(result, to))
