"""The command line: parse, call, print. Data on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console

from melayer.cli.options import Options, ScanOptions, TuneOptions, blocks_of, flat, resolved
from melayer.cli.session import load, progress, quiet, session, stderr
from melayer.errors import InputError, MelayerError
from melayer.version import __version__

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded
    from melayer.measurements.locate.result import LocateResult

app = typer.Typer(
    name="melayer",
    help="Find, explain, measure and relax massive activations in language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Argument(help="`demo`, a directory, a .gguf file or a hub id.", show_default=False)]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens kept of each text; default 512, or the model's positions.", rich_help_panel="Texts"),
]
MaxListed = Annotated[int, typer.Option(min=1, help="Massive scalars listed a text and block.")]
Layers = Annotated[
    str | None, typer.Option(help="Blocks to explain, e.g. 11 or 2,9-11 or 20-; default: the ME layer and every stage.")
]
Length = Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence; the rate falls with it.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, explain, measure and relax massive activations in language models."""


@app.command("locate")
@flat
def locate_command(
    model: Model,
    max_tokens: MaxTokens = None,
    max_listed: MaxListed = 16,
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
    with session(options.output.debug):
        given = {**options.arguments(), "max_tokens": max_tokens, "max_listed": max_listed}
        if frugal:
            _locate_frugally(model, {**given, "stop_early": stop_early}, options)
            return
        if stop_early:
            raise InputError("--stop-early was given, which stops the reading of blocks one by one. Add --frugal.")
        from melayer.measurements.locate.locate import locate
        from melayer.measurements.locate.table import show_locate

        _measure("Locating", locate, show_locate, model, given, options)


@app.command("explain")
@flat
def explain_command(
    model: Model,
    layers: Layers = None,
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
    with session(options.output.debug):
        given = {**options.arguments(), "max_tokens": max_tokens, "seeds": seeds, "top": top, "max_texts": max_texts}
        blocks = blocks_of("--layers", layers)
        from melayer.measurements.explain.explain import explain
        from melayer.measurements.explain.table import show_explain

        _measure("Explaining", explain, show_explain, model, given, options, blocks)


@app.command("rigidity")
@flat
def rigidity_command(
    model: Model,
    n_first_tokens: Annotated[int, typer.Option(help="Different first tokens to compare.")] = 64,
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
    with session(options.output.debug):
        given = {**options.arguments(), "max_tokens": max_tokens, "seed": seed}
        given |= {"n_first_tokens": n_first_tokens, "fixed_first_token": fixed_first_token}
        from melayer.measurements.rigidity.rigidity import rigidity
        from melayer.measurements.rigidity.table import show_rigidity

        _measure("Measuring rigidity", rigidity, show_rigidity, model, given, options)


@app.command("sinks")
@flat
def sinks_command(
    model: Model,
    T: Length = 64,
    epsilon: Annotated[float, typer.Option(help="A head is a sink head where a key draws more than this.")] = 0.3,
    *,
    options: Options,
) -> None:
    """Measure the attention that the first and the massive tokens draw, by block and head.

    Example: [bold]melayer sinks demo -T 128[/]
    """
    with session(options.output.debug):
        given = {**options.arguments(), "T": T, "epsilon": epsilon}
        from melayer.measurements.sinks.sinks import sinks
        from melayer.measurements.sinks.table import show_sinks

        _measure("Measuring sinks", sinks, show_sinks, model, given, options)


@app.command("sweep")
@flat
def sweep_command(
    model: Model,
    rates: Annotated[str, typer.Option(help="Shares of the dimensions to mask.")] = "0,0.1,...,1",
    selectors: Annotated[
        str, typer.Option(help="Of weight, weight-low, activation, activation-low and random.")
    ] = "weight,activation,random",
    strength: Annotated[float, typer.Option(help="How much of a masked entry is taken away.")] = 1.0,
    layers: Annotated[
        str | None, typer.Option(help="Masked blocks, e.g. 12- or 12,14-20; default: all after the ME layer.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of selector random.")] = 0,
    T: Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence, for perplexity and sinks.")] = 64,
    epsilon: Annotated[float, typer.Option(help="A head is a sink head where a key draws more than this.")] = 0.3,
    out: Annotated[
        Path | None, typer.Option(help="Directory for a report; a sweep that was stopped goes on from there.")
    ] = None,
    *,
    options: Options,
) -> None:
    """Measure perplexity, sinks, rigidity and effective rank under masks of every size.

    Example: [bold]melayer sweep demo --rates 0,0.5,1 --selectors weight,random --out demo-sweep[/]
    """
    with session(options.output.debug):
        shared, blocks = options.arguments(), blocks_of("--layers", layers)
        grid: dict[str, Any] = {"rates": _rates(rates), "selectors": _items(selectors)}
        from melayer.presentation.page import check_writable
        from melayer.studies.overview import write_report
        from melayer.studies.sweep.sweep import FILE, check_grid, sweep
        from melayer.studies.sweep.table import show_sweep

        check_grid(**grid)
        if out is not None:
            check_writable(out)
        loaded = load(model, options.model.loading())
        given: dict[str, Any] = {**shared, **grid, "strength": strength, "seed": seed, "T": T, "epsilon": epsilon}
        given |= {"layers": resolved(blocks, loaded, shared["parts"]), "resume": None if out is None else out / FILE}
        with progress("Sweeping") as part:
            result = sweep(loaded.model, loaded.tokenizer, **given, name=model, progress=part(0))
        written = None
        if out is not None:
            from melayer.loading.checkpoint import weight_hashes

            with stderr().status("Writing the report"):
                written = write_report(
                    result.located,
                    out,
                    sweep=result,
                    command=shlex.join(["melayer", *sys.argv[1:]]),
                    device=str(loaded.model.device),
                    weights=weight_hashes(loaded.model, model),
                )
        if options.output.as_json:
            typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
            return
        show_sweep(result, Console())
        if written is not None:
            output = Console(soft_wrap=True, highlight=False)
            output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)


@app.command("report")
@flat
def report_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for report.html and report.json.", show_default=False)],
    T: Annotated[
        int | None, typer.Option("--T", "-T", help="Tokens in each sequence for the sinks; default 64.")
    ] = None,
    max_tokens: MaxTokens = None,
    max_listed: MaxListed = 16,
    *,
    options: Options,
) -> None:
    """Measure all of it and write a page to look at.

    Example: [bold]melayer report demo --out demo-report[/]
    """
    with session(options.output.debug):
        from melayer.presentation.page import check_writable
        from melayer.studies.overview import write_report

        shared = options.arguments()
        check_writable(out)
        loaded = load(model, options.model.loading())
        located, rest, not_measured = _everything(loaded, model, shared, max_tokens, max_listed, T)
        from melayer.loading.checkpoint import weight_hashes

        with stderr().status("Writing the report"):
            written = write_report(
                located,
                out,
                **rest,
                not_measured=not_measured,
                command=shlex.join(["melayer", *sys.argv[1:]]),
                device=str(loaded.model.device),
                weights=weight_hashes(loaded.model, model),
            )
        if options.output.as_json:
            typer.echo(written.json.read_text(encoding="utf-8"))
        else:
            output = Console(soft_wrap=True, highlight=False)
            output.print(located.sentence, markup=False)
            output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)


@app.command("generate")
@flat
def generate_command(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to answer; repeatable.", show_default=False)],
    rate: Annotated[float, typer.Option("--mask-rate", help="The share of the dimensions to mask.")] = 0.5,
    strength: Annotated[float, typer.Option(help="How much of a masked entry is taken away.")] = 1.0,
    selector: Annotated[str, typer.Option(help="weight, weight-low, activation, activation-low or random.")] = "weight",
    layers: Annotated[
        str | None, typer.Option(help="Masked blocks, e.g. 12- or 12,14-20; default: all after the ME layer.")
    ] = None,
    positions: Annotated[str, typer.Option(help="first tokens, or all massive ones.")] = "first",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 128,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Chat template; default: where there is one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, and of selector random.")] = 0,
    *,
    options: Options,
) -> None:
    """Show the answers with and without the mask, side by side.

    The ME layer is located first, on melayer's own texts or those given; with --layers there is no need.

    Example: [bold]melayer generate demo --prompt "Why is the sky blue?" --mask-rate 0.5[/]
    """
    with session(options.output.debug):
        shared, blocks = options.arguments(), blocks_of("--layers", layers)
        from melayer.interventions.mask import WeMask
        from melayer.studies.answers.answers import answers
        from melayer.studies.answers.table import live_answers, show_answers

        fields: dict[str, Any] = {"rate": rate, "strength": strength, "selector": selector, "seed": seed}
        fields |= {"positions": positions}
        # Whatever is wrong with these is wrong before the model is loaded, too.
        WeMask(**{**fields, "me_layer": 0, "massive_above": 0.0})
        loaded = load(model, options.model.loading())
        if blocks is not None and positions == "first":
            mask = WeMask(**fields, layers=tuple(resolved(blocks, loaded, shared["parts"]) or ()))
        else:
            from melayer.measurements.locate.locate import locate

            with progress("Locating") as part:
                located = locate(loaded.model, loaded.tokenizer, **shared, name=model, progress=part(0))
            if blocks is not None:
                fields["layers"] = tuple(resolved(blocks, loaded, shared["parts"]) or ())
            mask = WeMask.from_located(located, **fields)
        asked: dict[str, Any] = {
            "mask": mask,
            "max_new_tokens": max_new_tokens,
            "chat": chat,
            "system": system,
            "name": model,
        }
        asked |= {"temperature": temperature, "seed": seed}
        if options.output.as_json:
            result = answers(loaded.model, loaded.tokenizer, prompt, **asked)
            typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
            return
        output = Console()
        if output.is_terminal:
            with live_answers(prompt, output) as stream:
                result = answers(loaded.model, loaded.tokenizer, prompt, **asked, stream=stream)
        else:
            result = answers(loaded.model, loaded.tokenizer, prompt, **asked)
        show_answers(result, output)


@app.command("eval")
@flat
def eval_command(
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="gsm8k, math500, aime24, mmlu, ifeval, xstest, wikitext2, or any of lm-eval's.", show_default=False
        ),
    ],
    mask_rate: Annotated[str | None, typer.Option(help="Shares of the dimensions to mask, e.g. 0.3,0.5.")] = None,
    selector: Annotated[
        str, typer.Option(help="Of weight, weight-low, activation, activation-low and random.")
    ] = "weight",
    strength: Annotated[float, typer.Option(help="How much of a masked entry is taken away.")] = 1.0,
    comparators: Annotated[
        str | None, typer.Option(help="Of set-zero, set-mean, flat-gamma, cap-write and remove-neurons.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Hold them to the model as it is loaded.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of selector random.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Directory with the items; default: the hub.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples; default: the task's own.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Chat template; default: where there is one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a generated answer; default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items answered at once.")] = 16,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer at most.")] = None,
    select_on: Annotated[
        str | None, typer.Option(help="Choose the best variant on these items: even, odd or 0-99,150-.")
    ] = None,
    report_on: Annotated[str | None, typer.Option(help="…and judge it on these.")] = None,
    allow_same_items: Annotated[
        bool, typer.Option("--allow-same-items", help="Let the two overlap; the result says so.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the answers and a report; a stopped run goes on from there.")
    ] = None,
    *,
    options: Options,
) -> None:
    """Evaluate the model with and without masks on benchmarks, compared in pairs.

    The ME layer is located first, on melayer's own texts or those given.

    Example: [bold]melayer eval demo --tasks ifeval,gsm8k --mask-rate 0.3,0.5 --data data --out demo-eval[/]
    """
    with session(options.output.debug):
        from melayer.cli.evaluation import Asked, run_eval

        asked = Asked(
            [] if mask_rate is None else _rates(mask_rate),
            _items(selector),
            strength,
            [] if comparators is None else _items(comparators),
            baseline,
            seed,
        )
        given = {"chat": chat, "system": system, "limit": items, "batch_size": batch_size, "max_length": max_length}
        run_eval(
            model,
            _items(tasks),
            asked,
            options,
            data=data,
            fewshot=fewshot,
            max_new_tokens=max_new_tokens,
            out=out,
            select_on=select_on,
            report_on=report_on,
            allow_same_items=allow_same_items,
            given=given,
        )


@app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(help="A directory that `eval --out` wrote.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Directory for a report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Compare two stored evaluations on the items that both answered.

    Example: [bold]melayer compare eval-before eval-after[/]
    """
    with session(debug):
        from melayer.cli.evaluation import run_compare

        run_compare(first, second, as_json=as_json, out=out)


@app.command("quant-check")
@flat
def quant_check_command(
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
    rate: Annotated[float, typer.Option("--mask-rate", help="The share of the dimensions to mask.")] = 0.5,
    selector: Annotated[str, typer.Option(help="weight, weight-low, activation, activation-low or random.")] = "weight",
    strength: Annotated[float, typer.Option(help="How much of a masked entry is taken away.")] = 1.0,
    layers: Annotated[
        str | None, typer.Option(help="Masked blocks, e.g. 12- or 12,14-20; default: all after the ME layer.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of selector random.")] = 0,
    prefix: Annotated[
        str | None, typer.Option(help="What every sequence begins with, and is baked; default: the BOS token.")
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
    with session(options.output.debug):
        from melayer.cli.quantising import run_quant_check

        given: dict[str, Any] = {"formats": _items(formats), "granularities": _items(granularities)}
        given |= {"treatments": None if treatments is None else _items(treatments)}
        given |= {"rate": rate, "selector": selector, "strength": strength, "seed": seed}
        given |= {"T": T, "n_sequences": n_sequences}
        run_quant_check(model, options, calibration=calibration, prefix=prefix, layers=layers, out=out, given=given)


@app.command("contrast")
@flat
def contrast_command(
    before: Annotated[str, typer.Argument(help="A model, as for the other commands.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Another, e.g. what `tune` made of it.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Directory for a page.")] = None,
    T: Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence for the sinks.")] = 64,
    epsilon: Annotated[float, typer.Option(help="A head is a sink head where a key draws more than this.")] = 0.3,
    n_first_tokens: Annotated[int, typer.Option(help="Different first tokens to compare.")] = 64,
    *,
    options: Options,
) -> None:
    """Locate, rigidity and sinks of two models on the same texts: what training has moved.

    Example: [bold]melayer contrast demo tuned --out demo-contrast[/]
    """
    with session(options.output.debug):
        from melayer.cli.tuning import run_contrast

        run_contrast(
            before, after, options, out=out, given={"T": T, "epsilon": epsilon, "n_first_tokens": n_first_tokens}
        )


@app.command("scan")
@flat
def scan_command(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .parquet file (also .gz, .zst), a directory or pattern of them, or a hub id.",
            show_default=False,
        ),
    ],
    sites: Annotated[str | None, typer.Option(help="Which to observe, e.g. block_out,ffn_act; default: all.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Measure what int8, fp8, int4 lose in linear inputs: one more pass.")
    ] = None,
    mask_rate: Annotated[float | None, typer.Option(help="…and under a mask of this share: yet another pass.")] = None,
    selector: Annotated[str, typer.Option(help="weight, weight-low, activation, activation-low or random.")] = "weight",
    strength: Annotated[float, typer.Option(help="How much of a masked entry is taken away.")] = 1.0,
    layers: Annotated[
        str | None, typer.Option(help="Masked blocks, e.g. 12- or 12,14-20; default: all after the ME layer.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of selector random.")] = 0,
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
    with session(options.output.debug):
        from melayer.cli.scanning import AskedMask, run_scan

        run_scan(
            model,
            data,
            AskedMask(mask_rate, selector, strength, blocks_of("--layers", layers), seed),
            options,
            sites=None if sites is None else _items(sites),
            formats=[] if formats is None else _items(formats),
            out=out,
            checkpoint_seconds=checkpoint_seconds,
        )


def main() -> None:
    """The entry point of the `melayer` command."""
    app()


# --- training -----------------------------------------------------------------------------------------------------

tune_app = typer.Typer(
    help="Fine-tune with the mask on, wherever the policy runs: SFT, DPO, GRPO.", no_args_is_help=True
)
app.add_typer(tune_app, name="tune")

Data = Annotated[
    str, typer.Option("--data", help="A .jsonl, .json, .parquet or .csv file (.gz), or a hub id.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="Directory for the model and its record.", show_default=False)]
ReferenceOption = Annotated[str, typer.Option("--reference", help="masked: as the policy is; plain: without the mask.")]


@tune_app.command("sft")
@flat
def sft_command(model: Model, data: Data, out: Out, *, options: TuneOptions) -> None:
    """Learn from answers, chats or texts.

    Example: [bold]melayer tune sft demo --data train.jsonl --out tuned --mask-rate 0.3 --steps 30[/]
    """
    with session(options.output.debug):
        from melayer.cli.tuning import run_tune

        run_tune("sft", model, data, out, options)


@tune_app.command("dpo")
@flat
def dpo_command(
    model: Model, data: Data, out: Out, reference: ReferenceOption = "masked", *, options: TuneOptions
) -> None:
    """Learn from pairs of a chosen and a rejected answer.

    Example: [bold]melayer tune dpo demo --data pairs.jsonl --out tuned --mask-rate 0.3 --lora[/]
    """
    with session(options.output.debug):
        from melayer.cli.tuning import run_tune

        run_tune("dpo", model, data, out, options, reference=reference)


@tune_app.command("grpo")
@flat
def grpo_command(
    model: Model,
    data: Data,
    out: Out,
    reference: ReferenceOption = "masked",
    instruction: Annotated[
        str | None, typer.Option(help="What each prompt ends with; default: to answer after ####.")
    ] = None,
    *,
    options: TuneOptions,
) -> None:
    """Learn from the policy's own answers to problems whose answer can be checked.

    Example: [bold]melayer tune grpo demo --data gsm8k.jsonl --out tuned --mask-rate 0.3 --steps 10[/]
    """
    with session(options.output.debug):
        from melayer.cli.tuning import run_tune

        run_tune("grpo", model, data, out, options, reference=reference, instruction=instruction)


# --- what the commands share --------------------------------------------------------------------------------------


class _Result(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def _locate_frugally(model: str, given: dict[str, Any], options: Options) -> None:
    """As `_measure`, without loading."""
    loading = options.model.loading()
    for name in ("device_map", "max_memory", "offload_folder", "allow_pickle", "base"):
        if loading.pop(name):
            raise InputError(f"--{name.replace('_', '-')} does not go with --frugal. Leave one of them out.")
    quiet()
    from melayer.measurements.locate.frugal import locate_frugal
    from melayer.measurements.locate.table import show_locate

    with progress("Locating", unit="blocks") as part:
        result = locate_frugal(model, **given, **loading, progress=part(0))
    if options.output.as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
    else:
        show_locate(result, Console())


def _measure(
    title: str,
    measurement: Callable[..., _Result],
    show: Callable[[Any, Console], None],
    model: str,
    given: dict[str, Any],
    options: Options,
    blocks: list[range] | None = None,
) -> None:
    """Load, measure under a bar, print."""
    loaded = load(model, options.model.loading())
    if blocks is not None:
        given = {**given, "layers": resolved(blocks, loaded, given["parts"])}
    with progress(title) as part:
        result = measurement(loaded.model, loaded.tokenizer, name=model, progress=part(0), **given)
    if options.output.as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
    else:
        show(result, Console())


def _everything(
    loaded: Loaded, name: str, shared: dict[str, Any], max_tokens: int | None, max_listed: int, T: int | None
) -> tuple[LocateResult, dict[str, Any], dict[str, str]]:
    """All measurements under one bar; those that this model or these texts do not allow, with the reason.

    Nobody asked for one of them in particular, so one that cannot be made takes nothing from the others.
    """
    from melayer.measurements.explain.explain import explain
    from melayer.measurements.locate.locate import locate
    from melayer.measurements.rigidity.rigidity import rigidity
    from melayer.measurements.sinks.sinks import sinks

    found, not_measured = {}, {}
    common = {**shared, "name": name}
    with progress("Locating", "Explaining", "Measuring rigidity", "Measuring sinks") as part:
        located = locate(
            loaded.model, loaded.tokenizer, **common, max_tokens=max_tokens, max_listed=max_listed, progress=part(0)
        )
        cut = {"max_tokens": max_tokens, "located": located}
        rest: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
            ("explain", explain, cut),
            ("rigidity", rigidity, cut),
            ("sinks", sinks, {} if T is None else {"T": T}),
        ]
        for place, (key, measurement, more) in enumerate(rest, start=1):
            try:
                found[key] = measurement(loaded.model, loaded.tokenizer, **common, **more, progress=part(place))
            except MelayerError as error:
                if key == "sinks" and T is not None:
                    raise
                not_measured[key] = str(error)
    for key, reason in not_measured.items():
        stderr().print(f"Note: {key} was not measured. {reason}", markup=False)
    return located, found, not_measured


def _items(given: str) -> list[str]:
    return [item.strip() for item in given.split(",") if item.strip()]


def _rates(given: str) -> list[float]:
    """The numbers that `0,0.1,...,1` names: `...` goes on in steps of the two before it to the one behind it."""
    rates: list[float] = []
    items = _items(given)
    for place, item in enumerate(items):
        if item == "...":
            if place < 2 or place + 1 == len(items) or "..." in items[place - 2 : place]:
                raise InputError(f"--rates {given!r} was given; '...' stands behind two rates and before the last one.")
            continue
        try:
            rate = float(item)
        except ValueError as error:
            raise InputError(f"--rates {given!r} was given; {item!r} is not a number. Give e.g. 0,0.5,1.") from error
        if place and items[place - 1] == "...":
            first, step = rates[-1], rates[-1] - rates[-2]
            count = round((rate - first) / step) if step and math.isfinite((rate - first) / step) else 0
            if not 0 < count <= 1000 or abs(first + count * step - rate) > 1e-6:
                raise InputError(f"--rates {given!r} was given; steps of {step:g} do not lead to {rate:g}.")
            # 0.1 + 0.2 is not 0.3 in binary, and the same rate is to be found again in a file.
            rates += [round(first + step * number, 10) for number in range(1, count)]
        rates.append(rate)
    return rates
