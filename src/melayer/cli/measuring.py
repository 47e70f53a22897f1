"""The commands that measure a model: locate, explain, rigidity, sinks, sweep, and all of it as a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console

from melayer.cli.options import (
    Epsilon,
    FirstTokens,
    MaskedBlocks,
    MaxListed,
    MaxTokens,
    Model,
    Options,
    OtherFirstTokens,
    Selectors,
    SelectorSeed,
    Strength,
    flat,
)
from melayer.cli.output import answer, command_line, page, require_writable, written_or_shown
from melayer.cli.parsing import blocks_of, items_of, layers_of, rates_of
from melayer.cli.session import load, progress, quiet
from melayer.cli.streams import print_json, say, stderr
from melayer.errors import InputError, MelayerError

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded
    from melayer.measurements.locate.result import LocateResult


commands = typer.Typer()


@commands.command("locate")
@flat
def locate_command(
    model: Model,
    max_tokens: MaxTokens = None,
    max_listed: MaxListed = 16,
    other_first_tokens: OtherFirstTokens = True,
    frugal: Annotated[
        bool,
        typer.Option("--frugal", help="One block at a time in memory; 32 tokens of each text, if not told otherwise."),
    ] = False,
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="With --frugal: stop when the ME layer is certain.")
    ] = False,
    *,
    options: Options,
) -> None:
    """Find the block where the massive activation emerges.

    Example: [bold]melayer locate demo --text "My favorite color is Dark Blue. The sky is clear today."[/]

    Example: [bold]melayer locate demo --frugal[/]
    """
    arguments = {**options.arguments(), "max_tokens": max_tokens, "max_listed": max_listed}
    if frugal:
        _locate_frugally(model, {**arguments, "stop_early": stop_early}, options)
        return
    if stop_early:
        raise InputError("--stop-early was given, which stops the reading of blocks one by one. Add --frugal.")
    from melayer.measurements.locate.locate import locate
    from melayer.measurements.locate.table import show_locate

    arguments["other_first_tokens"] = other_first_tokens
    _measure("Locating", locate, show_locate, model, arguments, options)


@commands.command("explain")
@flat
def explain_command(
    model: Model,
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks to explain, e.g. 11 or 2,9-11 or 20-; default: the ME layer and every stage."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Permutations of gamma to try.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="Neurons to list.")] = 10,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts in which to ask for the causes.")] = 4,
    max_tokens: MaxTokens = None,
    *,
    options: Options,
) -> None:
    """Explain why it is there: norms along the block, neurons, and what is left without a part.

    Example: [bold]melayer explain demo --layers 11,28[/]
    """
    arguments = options.arguments()
    arguments |= {"max_tokens": max_tokens, "seeds": seeds, "top": top, "max_texts": max_texts}
    blocks = blocks_of("--layers", layers)
    from melayer.measurements.explain.explain import explain
    from melayer.measurements.explain.table import show_explain

    _measure("Explaining", explain, show_explain, model, arguments, options, blocks)


@commands.command("rigidity")
@flat
def rigidity_command(
    model: Model,
    n_first_tokens: FirstTokens = 64,
    fixed_first_token: Annotated[
        bool, typer.Option("--fixed-first-token", help="The trivial case: one first token, cosine 1 by causality.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of first tokens.")] = 0,
    max_tokens: MaxTokens = None,
    *,
    options: Options,
) -> None:
    """Measure what it makes rigid: the massive token's state across blocks and inputs.

    Example: [bold]melayer rigidity demo --n-first-tokens 256[/]
    """
    arguments = {**options.arguments(), "max_tokens": max_tokens, "seed": seed}
    arguments |= {"n_first_tokens": n_first_tokens, "fixed_first_token": fixed_first_token}
    from melayer.measurements.rigidity.rigidity import rigidity
    from melayer.measurements.rigidity.table import show_rigidity

    _measure("Measuring rigidity", rigidity, show_rigidity, model, arguments, options)


@commands.command("sinks")
@flat
def sinks_command(
    model: Model,
    T: Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence; the rate falls with it.")] = 64,
    epsilon: Epsilon = 0.3,
    *,
    options: Options,
) -> None:
    """Measure the attention that the first and the massive tokens draw, by block and head.

    Example: [bold]melayer sinks demo -T 128[/]
    """
    arguments = {**options.arguments(), "T": T, "epsilon": epsilon}
    from melayer.measurements.sinks.sinks import sinks
    from melayer.measurements.sinks.table import show_sinks

    _measure("Measuring sinks", sinks, show_sinks, model, arguments, options)


@commands.command("sweep")
@flat
def sweep_command(  # noqa: PLR0913 - one parameter an option
    model: Model,
    rates: Annotated[str, typer.Option(help="Shares of the dimensions to mask.")] = "0,0.1,...,1",
    selectors: Selectors = "weight,activation,random",
    strength: Strength = 1.0,
    layers: MaskedBlocks = None,
    seed: SelectorSeed = 0,
    T: Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence, for perplexity and sinks.")] = 64,
    epsilon: Epsilon = 0.3,
    out: Annotated[
        Path | None, typer.Option(help="Directory for a report; a sweep that was stopped goes on from there.")
    ] = None,
    *,
    options: Options,
) -> None:
    """Measure perplexity, sinks, rigidity and effective rank under masks of every size.

    Example: [bold]melayer sweep demo --rates 0,0.5,1 --selectors weight,random --out demo-sweep[/]
    """
    arguments, blocks = options.arguments(), blocks_of("--layers", layers)
    grid: dict[str, Any] = {"rates": rates_of(rates), "selectors": items_of(selectors)}
    from melayer.studies.sweep.sweep import FILE, check_grid, sweep
    from melayer.studies.sweep.table import show_sweep

    check_grid(**grid)
    require_writable(out)
    loaded = load(model, options.model.loading())
    arguments |= {**grid, "strength": strength, "seed": seed, "T": T, "epsilon": epsilon}
    arguments["layers"] = layers_of(blocks, loaded, arguments["parts"])
    arguments["resume"] = None if out is None else out / FILE
    with progress("Sweeping") as part:
        result = sweep(loaded.model, loaded.tokenizer, **arguments, name=model, progress=part(0))
    written = None if out is None else overview(result.located, out, loaded, model, {"sweep": result})
    answer(options.output.as_json, result.to_dict, lambda to: show_sweep(result, to), written)


@commands.command("report")
@flat
def report_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for report.html and report.json.", show_default=False)],
    T: Annotated[
        int | None, typer.Option("--T", "-T", help="Tokens in each sequence for the sinks; default 64.")
    ] = None,
    max_tokens: MaxTokens = None,
    max_listed: MaxListed = 16,
    other_first_tokens: OtherFirstTokens = True,
    *,
    options: Options,
) -> None:
    """Measure all of it and write a page to look at.

    Example: [bold]melayer report demo --out demo-report[/]
    """
    arguments = options.arguments()
    require_writable(out)
    loaded = load(model, options.model.loading())
    of_locate = {"max_tokens": max_tokens, "max_listed": max_listed, "other_first_tokens": other_first_tokens}
    located, rest = everything(loaded, model, arguments, of_locate, T)
    written = written_or_shown(
        lambda: overview(located, out, loaded, model, rest),
        options.output.as_json,
        lambda: {
            "locate": located.to_dict(),
            **{key: of.to_dict() for key, of in rest.items() if hasattr(of, "to_dict")},
        },
        lambda to: to.print(located.sentence, markup=False),
    )
    if options.output.as_json:
        print_json(json.loads(written.json.read_text(encoding="utf-8")))
    else:
        page(written, before=located.sentence)


# --- what they share ----------------------------------------------------------------------------------------------


class _Result(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def _measure(
    title: str,
    measurement: Callable[..., _Result],
    show: Callable[[Any, Console], None],
    model: str,
    arguments: dict[str, Any],
    options: Options,
    blocks: list[range] | None = None,
) -> None:
    """Load, measure under a bar, print."""
    loaded = load(model, options.model.loading())
    if blocks is not None:
        arguments = {**arguments, "layers": layers_of(blocks, loaded, arguments["parts"])}
    with progress(title) as part:
        result = measurement(loaded.model, loaded.tokenizer, name=model, progress=part(0), **arguments)
    answer(options.output.as_json, result.to_dict, lambda to: show(result, to))


def _locate_frugally(model: str, arguments: dict[str, Any], options: Options) -> None:
    """As `_measure`, without loading."""
    loading = options.model.loading()
    for name in ("device_map", "max_memory", "offload_folder", "allow_pickle", "base"):
        if loading.pop(name):
            raise InputError(f"--{name.replace('_', '-')} does not go with --frugal. Leave one of them out.")
    quiet()
    from melayer.measurements.locate.frugal import locate_frugal
    from melayer.measurements.locate.table import show_locate

    with progress("Locating", unit="blocks") as part:
        result = locate_frugal(model, **arguments, **loading, progress=part(0))
    answer(options.output.as_json, result.to_dict, lambda to: show_locate(result, to))


def everything(
    loaded: Loaded, name: str, shared: dict[str, Any], cut: dict[str, Any], T: int | None
) -> tuple[LocateResult, dict[str, Any]]:
    """All measurements under one bar; those that this model or these texts do not allow, with the reason.

    Nobody asked for one of them in particular, so one that cannot be made takes nothing from the others.
    """
    from melayer.measurements.explain.explain import explain
    from melayer.measurements.locate.locate import locate
    from melayer.measurements.rigidity.rigidity import rigidity
    from melayer.measurements.sinks.sinks import sinks

    results: dict[str, Any] = {}
    not_measured: dict[str, str] = {}
    common = {**shared, "name": name}
    with progress("Locating", "Explaining", "Measuring rigidity", "Measuring sinks") as part:
        located = locate(loaded.model, loaded.tokenizer, **common, **cut, progress=part(0))
        known = {"max_tokens": cut["max_tokens"], "located": located}
        rest: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
            ("explain", explain, known),
            ("rigidity", rigidity, known),
            ("sinks", sinks, {} if T is None else {"T": T}),
        ]
        for place, (key, measurement, more) in enumerate(rest, start=1):
            try:
                results[key] = measurement(loaded.model, loaded.tokenizer, **common, **more, progress=part(place))
            except MelayerError as error:
                if key == "sinks" and T is not None:
                    raise
                not_measured[key] = str(error)
    for key, reason in not_measured.items():
        say(f"Note: {key} was not measured. {reason}")
    return located, {**results, "not_measured": not_measured}


def overview(located: LocateResult, out: Path, loaded: Loaded, name: str, results: dict[str, Any]) -> Any:
    """The page with these results, and what it was made from."""
    from melayer.loading.checkpoint import weight_hashes
    from melayer.studies.overview import write_report

    with stderr().status("Writing the report"):
        return write_report(
            located,
            out,
            **results,
            command=command_line(),
            device=str(loaded.model.device),
            weights=weight_hashes(loaded.model),
        )
