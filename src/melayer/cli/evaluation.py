"""What the commands `eval` and `compare` do once their options are parsed."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from melayer.cli.options import Options
from melayer.cli.session import load, own_device, progress, stderr
from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.evaluation.evaluate import Variant
    from melayer.evaluation.result import EvalResult
    from melayer.interventions.load import Loaded

COMPARATORS = ("set-zero", "set-mean", "flat-gamma", "cap-write", "remove-neurons")


@dataclass(frozen=True)
class Asked:
    """Which variants to make."""

    rates: Sequence[float]
    selectors: Sequence[str]
    strength: float
    comparators: Sequence[str]
    baseline: bool
    seed: int

    def check(self) -> None:
        """Raises InputError for whatever is wrong before a model is loaded."""
        from melayer.interventions.mask import WeMask

        for selector in self.selectors:
            for rate in self.rates:
                WeMask(rate=rate, strength=self.strength, selector=selector, seed=self.seed, me_layer=0)  # type: ignore[arg-type]
        for name in self.comparators:
            if name not in COMPARATORS:
                raise InputError(f"There is no comparator {name!r}; expected some of {', '.join(COMPARATORS)}.")
        if not self.baseline and not self.rates and not self.comparators:
            raise InputError("Nothing to evaluate: give --baseline, --mask-rate or --comparators.")

    def variants(self, loaded: Loaded, name: str, shared: dict[str, Any]) -> dict[str, Variant | None]:
        """By label; the model as it was loaded comes first."""
        made: dict[str, Variant | None] = {}
        if self.baseline:
            made["plain" if loaded.mask is None else "saved mask"] = None
        if not self.rates and not self.comparators:
            return made
        if loaded.mask is not None:
            raise InputError(
                "A mask that was saved with the model is applied already, so none can be added. Leave --mask-rate and "
                "--comparators out, or give --no-mask."
            )
        from melayer.interventions.comparators import CapWrite, FlatGamma, RemoveNeurons, SetMassive
        from melayer.interventions.mask import WeMask
        from melayer.measurements.locate.locate import locate

        model, tokenizer = loaded.model, loaded.tokenizer
        with progress("Locating") as part:
            located = locate(model, tokenizer, **shared, name=name, progress=part(0))
        for selector in self.selectors:
            for rate in self.rates:
                options = {"rate": rate, "strength": self.strength, "selector": selector, "seed": self.seed}
                made[f"{selector} {rate:g}"] = WeMask.from_located(located, **options)
        given = {"texts": shared["texts"], "parts": shared["parts"]}
        makers: dict[str, Callable[[], Variant]] = {
            "set-zero": lambda: SetMassive.from_located(located, to="zero"),
            "set-mean": lambda: SetMassive.from_located(located, to="mean"),
            "flat-gamma": lambda: FlatGamma.from_located(located),
            "cap-write": lambda: CapWrite.calibrated(model, tokenizer, located, **given),
            "remove-neurons": lambda: RemoveNeurons.top(model, tokenizer, located, **given),
        }
        return {**made, **{comparator: makers[comparator]() for comparator in self.comparators}}


def run_eval(
    model: str,
    tasks: Sequence[str],
    asked: Asked,
    options: Options,
    *,
    data: Path | None,
    fewshot: int | None,
    max_new_tokens: int | None,
    out: Path | None,
    select_on: str | None,
    report_on: str | None,
    allow_same_items: bool,
    given: dict[str, Any],
) -> None:
    """Loads, evaluates under a bar, prints; under `accelerate launch` the first process alone prints."""
    from melayer.evaluation.evaluate import evaluate
    from melayer.evaluation.select import select, split
    from melayer.evaluation.tasks import load_tasks
    from melayer.presentation.page import check_writable

    if (select_on is None) != (report_on is None):
        raise InputError("--select-on and --report-on go together: give both, or neither.")
    asked.check()
    shared = options.arguments()
    if out is not None:
        check_writable(out)
    with stderr().status("Loading the tasks"):
        benchmarks = load_tasks(tasks, data=data, fewshot=fewshot, max_new_tokens=max_new_tokens)
    if select_on is not None and report_on is not None:
        for benchmark in benchmarks:  # now, and not after hours of answering
            split(benchmark.name, benchmark.keys(given["limit"]), select_on, report_on, allow_same_items)
    loading = options.model.loading()
    loaded = load(model, {**loading, **_placed(loading)})
    variants = asked.variants(loaded, model, shared)
    with progress("Answering", unit="answers") as part:
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            benchmarks,
            variants,
            parts=shared["parts"],
            name=model,
            store=out,
            progress=part(0),
            **given,
        )
    if select_on is not None and report_on is not None:
        result = select(result, on=select_on, report_on=report_on, allow_same_items=allow_same_items)
    if os.environ.get("RANK", "0") == "0":
        _print(result, options.output.as_json, out)


def run_compare(first: Path, second: Path, *, as_json: bool, out: Path | None) -> None:
    """Reads two stored runs and prints their comparison."""
    from melayer.evaluation.select import compare_runs
    from melayer.presentation.page import check_writable

    if out is not None:
        check_writable(out)
    _print(compare_runs(first, second), as_json, out)


def _print(result: EvalResult, as_json: bool, out: Path | None) -> None:
    from melayer.evaluation.report import write_eval_report
    from melayer.evaluation.table import show_eval

    written = None if out is None else write_eval_report(result, out, command=shlex.join(["melayer", *sys.argv[1:]]))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
        return
    show_eval(result, Console())
    if written is not None:
        output = Console(soft_wrap=True, highlight=False)
        output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)


def _placed(loading: dict[str, Any]) -> dict[str, Any]:
    """bfloat16 on a CPU that computes with it, and for each process a device of its own."""
    import torch

    found = own_device(loading)
    on_cpu = loading["device"] == "cpu" or (
        loading["device"] == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )
    if loading["dtype"] == "auto" and on_cpu and torch.cpu._is_avx512_bf16_supported():
        found["dtype"] = "bfloat16"
    return found
