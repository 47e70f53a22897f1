"""The command that scans a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melayer.cli.masks import MaskRequest, require_plain
from melayer.cli.options import MaskedBlocks, Model, ScanOptions, Selector, SelectorSeed, Strength, flat
from melayer.cli.output import answer, command_line, require_writable
from melayer.cli.parsing import blocks_of, items_of
from melayer.cli.session import load, own_device, progress, stopped_by_term

commands = typer.Typer()


@commands.command("scan")
@flat
def scan_command(  # noqa: PLR0913 - one parameter an option
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Text, JSON lines, parquet or CSV (also .gz, .zst), a directory or pattern of them, or a hub id.",
            show_default=False,
        ),
    ],
    sites: Annotated[str | None, typer.Option(help="Which to observe, e.g. block_out,ffn_act; default: all.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Measure what int8, fp8, int4 lose in linear inputs: one more pass.")
    ] = None,
    mask_rate: Annotated[float | None, typer.Option(help="…and under a mask of this share: yet another pass.")] = None,
    selector: Selector = "weight",
    strength: Strength = 1.0,
    layers: MaskedBlocks = None,
    seed: SelectorSeed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the state and a report; a stopped scan goes on from there.")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="How often the state is kept in --out.")] = 60.0,
    *,
    options: ScanOptions,
) -> None:
    """Count how large the activations of every site get over a corpus of any size, and where.

    Under torchrun or accelerate launch the processes share the documents.

    Example: [bold]melayer scan demo --data corpus.jsonl --limit 1000 --out demo-scan[/]
    """
    request = MaskRequest(mask_rate, selector, strength, seed, blocks=blocks_of("--layers", layers))
    from melayer.census.observe import SITES
    from melayer.census.report import write_scan_report
    from melayer.census.scan import check, scan
    from melayer.census.table import show_scan

    arguments, corpus = options.arguments(), options.corpus.corpus(data)
    observed = SITES if sites is None else items_of(sites)
    rounded = [] if formats is None else items_of(formats)
    request.check()
    check(observed, rounded, mask_rate is not None, arguments["limit"])
    corpus.check()
    require_writable(out)
    loading = options.model.loading()
    loaded = load(model, {**loading, **own_device(loading)})
    mask = None
    if mask_rate is not None:
        require_plain(loaded, "--mask-rate")
        mask = request.made(loaded, model, {key: arguments[key] for key in ("bos", "criterion", "parts")})
    with stopped_by_term(out), progress("Scanning", unit="documents") as part:
        result = scan(
            loaded.model,
            loaded.tokenizer,
            corpus,
            sites=observed,
            formats=rounded,
            mask=mask,
            store=out,
            checkpoint_seconds=checkpoint_seconds,
            name=model,
            progress=part(0),
            **arguments,
        )
    if result is None:  # of several processes the first alone has it
        return
    written = None if out is None else write_scan_report(result, out, command=command_line())
    answer(options.output.as_json, result.to_dict, lambda to: show_scan(result, to), written)
