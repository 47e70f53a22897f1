"""The commands that evaluate on benchmarks: eval and compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melayer.cli.masks import MaskRequest, located, require_plain
from melayer.cli.options import Chat, Model, Options, Selectors, SelectorSeed, StoredOptions, Strength, System, flat
from melayer.cli.output import answer, command_line, require_writable
from melayer.cli.parsing import items_of, rates_of
from melayer.cli.session import load, own_device, progress
from melayer.cli.streams import stderr
from melayer.errors import InputError, require_known

if TYPE_CHECKING:
    from melayer.evaluation.evaluate import Variant
    from melayer.evaluation.result import EvalResult
    from melayer.evaluation.tasks import Benchmark
    from melayer.interventions.load import Loaded

commands = typer.Typer()

COMPARATORS = ("set-zero", "set-mean", "flat-gamma", "cap-write", "remove-neurons")


@commands.command("eval")
@flat
def eval_command(  # noqa: PLR0913 - one parameter an option
    model: Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="gsm8k, math500, aime24, mmlu, ifeval, xstest, wikitext2, or any of lm-eval's.", show_default=False
        ),
    ],
    mask_rate: Annotated[str | None, typer.Option(help="Shares of the dimensions to mask, e.g. 0.3,0.5.")] = None,
    selector: Selectors = "weight",
    strength: Strength = 1.0,
    comparators: Annotated[
        str | None, typer.Option(help="Of set-zero, set-mean, flat-gamma, cap-write and remove-neurons.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Hold them to the model as it is loaded.")
    ] = True,
    seed: SelectorSeed = 0,
    data: Annotated[Path | None, typer.Option(help="Directory with the items; default: the hub.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples; default: the task's own.")] = None,
    chat: Chat = None,
    system: System = None,
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
    masks = [
        MaskRequest(rate, name, strength, seed)
        for name in items_of(selector)
        for rate in ([] if mask_rate is None else rates_of(mask_rate))
    ]
    variants = _Variants(masks, [] if comparators is None else items_of(comparators), baseline)
    selection = _Selection.asked(select_on, report_on, allow_same_items)
    variants.check()
    arguments = options.arguments()
    require_writable(out)
    from melayer.evaluation.evaluate import evaluate
    from melayer.evaluation.tasks import load_tasks

    with stderr().status("Loading the tasks"):
        benchmarks = load_tasks(
            items_of(tasks),
            data=data,
            fewshot=fewshot,
            max_new_tokens=max_new_tokens,
            trust_remote_code=options.model.loading()["trust_remote_code"],
        )
    if selection is not None:
        selection.check(benchmarks, items)  # now, and not after hours of answering
    loading = options.model.loading()
    loaded = load(model, {**loading, **_placed(loading)})
    made = variants.made(loaded, model, arguments)
    with progress("Answering", unit="answers") as part:
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            benchmarks,
            made,
            chat=chat,
            system=system,
            limit=items,
            batch_size=batch_size,
            max_length=max_length,
            bos=arguments["bos"],
            parts=arguments["parts"],
            name=model,
            store=out,
            progress=part(0),
        )
    if selection is not None:
        result = selection.made(result)
    # Of the processes that `accelerate launch` started the first alone prints.
    if os.environ.get("RANK", "0") == "0":
        _print(result, options.output.as_json, out)


@commands.command("compare")
@flat
def compare_command(
    first: Annotated[Path, typer.Argument(help="A directory that `eval --out` wrote.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Directory for a report.")] = None,
    *,
    options: StoredOptions,
) -> None:
    """Compare two stored evaluations on the items that both answered.

    Example: [bold]melayer compare eval-before eval-after[/]
    """
    from melayer.evaluation.select import compare_runs

    require_writable(out)
    _print(compare_runs(first, second), options.output.as_json, out)


@dataclass(frozen=True)
class _Variants:
    """Which variants of the model answer."""

    masks: Sequence[MaskRequest]
    comparators: Sequence[str]
    baseline: bool

    def check(self) -> None:
        """Raises InputError for whatever is wrong before a model is loaded."""
        for mask in self.masks:
            mask.check()
        for name in self.comparators:
            require_known(name, COMPARATORS, f"There is no comparator {name!r}", expected="some of")
        if not self.baseline and not self.masks and not self.comparators:
            raise InputError("Nothing to evaluate: give --baseline, --mask-rate or --comparators.")

    def made(self, loaded: Loaded, name: str, shared: dict[str, Any]) -> dict[str, Variant | None]:
        """By label; the model as it was loaded comes first."""
        plain: dict[str, Variant | None] = {}
        if self.baseline:
            plain["plain" if loaded.mask is None else "saved mask"] = None
        if not self.masks and not self.comparators:
            return plain
        require_plain(loaded, "--mask-rate and --comparators")
        from melayer.interventions.comparators import CapWrite, FlatGamma, RemoveNeurons, SetMassive

        model, tokenizer = loaded.model, loaded.tokenizer
        at = located(loaded, name, shared)
        masked = {f"{mask.selector} {mask.rate:g}": mask.on(at) for mask in self.masks}
        texts = {"texts": shared["texts"], "parts": shared["parts"]}
        makers: dict[str, Callable[[], Variant]] = {
            "set-zero": lambda: SetMassive.from_located(at, to="zero"),
            "set-mean": lambda: SetMassive.from_located(at, to="mean"),
            "flat-gamma": lambda: FlatGamma.from_located(at),
            "cap-write": lambda: CapWrite.calibrated(model, tokenizer, at, **texts),
            "remove-neurons": lambda: RemoveNeurons.top(model, tokenizer, at, **texts),
        }
        return {**plain, **masked, **{comparator: makers[comparator]() for comparator in self.comparators}}


@dataclass(frozen=True)
class _Selection:
    """On which items the best variant is chosen, and on which it is judged."""

    select_on: str
    report_on: str
    allow_same_items: bool

    @classmethod
    def asked(cls, select_on: str | None, report_on: str | None, allow_same_items: bool) -> _Selection | None:
        """What the options ask for, if anything."""
        if (select_on is None) != (report_on is None):
            raise InputError("--select-on and --report-on go together: give both, or neither.")
        if select_on is None or report_on is None:
            return None
        return cls(select_on, report_on, allow_same_items)

    def check(self, benchmarks: Sequence[Benchmark], limit: int | None) -> None:
        """Raises InputError where the items cannot be divided so."""
        from melayer.evaluation.select import split

        for benchmark in benchmarks:
            split(benchmark.name, benchmark.keys(limit), self.select_on, self.report_on, self.allow_same_items)

    def made(self, result: EvalResult) -> EvalResult:
        """The result with the variant that was chosen."""
        from melayer.evaluation.select import select

        return select(result, on=self.select_on, report_on=self.report_on, allow_same_items=self.allow_same_items)


def _print(result: EvalResult, as_json: bool, out: Path | None) -> None:
    from melayer.evaluation.report import write_eval_report
    from melayer.evaluation.table import show_eval

    written = None if out is None else write_eval_report(result, out, command=command_line())
    answer(as_json, result.to_dict, lambda to: show_eval(result, to), written)


def _placed(loading: dict[str, Any]) -> dict[str, Any]:
    """bfloat16 on a CPU that computes with it, and for each process a device of its own."""
    import torch

    placed = own_device(loading)
    on_cpu = loading["device"] == "cpu" or (
        loading["device"] == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )
    if loading["dtype"] == "auto" and on_cpu and torch.cpu._is_avx512_bf16_supported():
        placed["dtype"] = "bfloat16"
    return placed
