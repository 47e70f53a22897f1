"""The command that measures what quantised activations cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from melayer.cli.masks import MaskRequest
from melayer.cli.options import MaskedBlocks, MaskRate, Model, Options, Selector, SelectorSeed, Strength, flat
from melayer.cli.output import answer, command_line, require_writable
from melayer.cli.parsing import blocks_of, items_of, layers_of
from melayer.cli.session import load, progress
from melayer.errors import InputError, border
from melayer.runs import ours

commands = typer.Typer()


@commands.command("quant-check")
@flat
def quant_check_command(  # noqa: PLR0913 - one parameter an option
    model: Model,
    formats: Annotated[str, typer.Option(help="Of int8, fp8 and int4.")] = "int8,fp8,int4",
    granularities: Annotated[
        str, typer.Option(help="Of per-tensor, per-token and per-channel.")
    ] = "per-tensor,per-token,per-channel",
    treatments: Annotated[
        str | None, typer.Option(help="Of plain, baked, baked+mask and mask; default: all that are possible.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Texts for the scales; default: every other sequence of the texts.")
    ] = None,
    rate: MaskRate = 0.5,
    selector: Selector = "weight",
    strength: Strength = 1.0,
    layers: MaskedBlocks = None,
    seed: SelectorSeed = 0,
    prefix: Annotated[
        str | None, typer.Option(help="What every sequence begins with, and is baked; default: the tokenizer's way.")
    ] = None,
    T: Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence, the prefix counted.")] = 64,
    n_sequences: Annotated[int, typer.Option(help="Sequences to predict, and to calibrate with, at most.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Directory for a report, scales and prefixes; goes on from there.")
    ] = None,
    *,
    options: Options,
) -> None:
    """Measure what quantised activations cost, and how much of it the massive token is to blame for.

    Example: [bold]melayer quant-check demo --formats int8 --out demo-quant[/]
    """
    from melayer.quantisation.quant_check import FILE, quant_check
    from melayer.quantisation.report import write_quant_report
    from melayer.quantisation.result import QuantCheckResult
    from melayer.quantisation.table import show_quant_check

    arguments: dict[str, Any] = {
        "formats": items_of(formats),
        "granularities": items_of(granularities),
        "treatments": None if treatments is None else items_of(treatments),
        "rate": rate,
        "selector": selector,
        "strength": strength,
        "seed": seed,
        "T": T,
        "n_sequences": n_sequences,
    }
    _check(arguments)
    arguments |= options.arguments()
    blocks = blocks_of("--layers", layers)
    arguments["calibration"] = None if calibration is None else options.texts.of_file(calibration)
    require_writable(out)
    if out is not None:
        ours.require([out / FILE, *QuantCheckResult.files_of(out)])
    loaded = load(model, options.model.loading())
    if prefix is not None:
        with border("--prefix cannot be tokenised", "Give the text that every sequence begins with."):
            arguments["prefix"] = loaded.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        if not arguments["prefix"]:
            raise InputError(f"--prefix {prefix!r} gives no tokens. Give the text that every sequence begins with.")
    arguments["layers"] = layers_of(blocks, loaded, arguments["parts"])
    arguments["resume"] = None if out is None else out / FILE
    with progress("Quantising") as part:
        result = quant_check(loaded.model, loaded.tokenizer, **arguments, name=model, progress=part(0))
    written, behind = None, ""
    if out is not None:
        result.save(out)
        written = write_quant_report(result, out, command=command_line())
        behind = (
            f" The scales are in {written.json.parent / 'scales.safetensors'}, each baked prefix in a directory of its "
            "treatment's name."
        )
    answer(options.output.as_json, result.to_dict, lambda to: show_quant_check(result, to), written, behind=behind)


def _check(arguments: dict[str, Any]) -> None:
    """Raises InputError for whatever is wrong before a model is loaded."""
    from melayer.quantisation.choices import Choices

    Choices.of(arguments["formats"], arguments["granularities"], arguments["treatments"])
    MaskRequest(arguments["rate"], arguments["selector"], arguments["strength"], arguments["seed"]).check()
