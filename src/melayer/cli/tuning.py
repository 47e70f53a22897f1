"""What the commands `tune` and `contrast` do once their options are parsed."""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from melayer.cli.options import Options, TuneOptions, blocks_of, resolved
from melayer.cli.session import load, progress
from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded
    from melayer.interventions.mask import WeMask
    from melayer.studies.contrast.result import Measured
    from melayer.tuning.rows import Method


def run_tune(method: Method, model: str, data: str, out: Path, options: TuneOptions, **more: Any) -> None:
    """Loads, locates where a mask is asked for, trains under a bar, prints; only the first process of several."""
    from melayer.interventions.mask import WeMask
    from melayer.tuning import config as training_config
    from melayer.tuning import run as training

    training.check_installed()
    shared, rows, asked = options.arguments(), options.rows.arguments(), options.masking
    if asked.mask_rate is not None:
        # Whatever is wrong with these is wrong before the model is loaded, too.
        fields = _fields(options)
        WeMask(**{**fields, "me_layer": 0, "massive_above": 0.0})
    blocks = blocks_of("--layers", asked.layers)
    if asked.mask_rate is None and blocks is not None:
        raise InputError("--layers says which blocks are masked, but there is no mask. Add --mask-rate.")
    chosen = options.training
    config = {} if chosen.config is None else training_config.read(chosen.config)
    config = training_config.check(method, {**config, **chosen.overrides()}, masked=asked.mask_rate is not None)
    import datasets

    datasets.disable_progress_bars()
    loaded, saved = _loaded(model, options)
    mask = saved
    if asked.mask_rate is not None:
        if saved is not None:
            raise InputError(
                f"{model} comes with a mask, which is on in training too. Leave --mask-rate out, or give --no-mask."
            )
        mask = _mask(loaded, model, shared, options, blocks)
    from melayer.tuning import tune

    given: dict[str, Any] = {
        **rows,
        **more,
        "out": out,
        "mask": mask,
        "lora": chosen.adapter(),
        "config": config,
        "seed": chosen.seed,
        "resume": chosen.resume,
        "parts": shared["parts"],
        "name": str(Path(model).resolve()) if Path(model).is_dir() else model,
    }
    with progress("Training", unit="steps") as part:
        advance = part(0)

        def report(done: int, total: int, figures: Mapping[str, float]) -> None:
            key = next((key for key in ("reward", "loss", "eval_loss") if key in figures), None)
            advance(done, total, "" if key is None else f"{key.removeprefix('eval_')} {figures[key]:.4g}")

        result = getattr(tune, method)(loaded.model, loaded.tokenizer, data, **given, progress=report)
    if os.environ.get("RANK", "0") != "0":
        return
    from melayer.tuning.report import write_tune_report
    from melayer.tuning.run_directory import plain
    from melayer.tuning.table import show_tune

    history = result.history()
    written = write_tune_report(result, history, command=shlex.join(["melayer", *sys.argv[1:]]))
    if options.output.as_json:
        typer.echo(json.dumps(plain(result.to_dict()), ensure_ascii=False, indent=1, allow_nan=False))
        return
    show_tune(result, history, Console())
    output = Console(soft_wrap=True, highlight=False)
    output.print(f"The model is in {out}: melayer eval {out} ... takes it, mask included.", markup=False)
    output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)


def run_contrast(before: str, after: str, options: Options, *, out: Path | None, given: dict[str, Any]) -> None:
    """Measures one model after the other, so that only one is in memory, and prints the comparison."""
    from melayer.presentation.page import check_writable
    from melayer.studies.contrast.contrast import contrast
    from melayer.studies.contrast.report import write_contrast_report
    from melayer.studies.contrast.table import show_contrast

    shared = options.arguments()
    if out is not None:
        check_writable(out)
    sides = [_measured(name, shared, options, given) for name in (before, after)]
    result = contrast(*sides)
    written = None
    if out is not None:
        written = write_contrast_report(result, out, command=shlex.join(["melayer", *sys.argv[1:]]))
    if options.output.as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
        return
    show_contrast(result, Console())
    if written is not None:
        output = Console(soft_wrap=True, highlight=False)
        output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)


def _measured(name: str, shared: dict[str, Any], options: Options, given: dict[str, Any]) -> Measured:
    from melayer.studies.contrast.contrast import measure

    loaded = load(name, options.model.loading())
    with progress("Locating", "Measuring rigidity", "Measuring sinks") as part:
        result = measure(loaded.model, loaded.tokenizer, **shared, **given, mask=loaded.mask, name=name, part=part)
    del loaded
    gc.collect()
    return result


def _fields(options: TuneOptions) -> dict[str, Any]:
    asked = options.masking
    return {
        "rate": asked.mask_rate,
        "strength": asked.strength,
        "selector": asked.selector,
        "positions": asked.positions,
        "seed": options.training.seed,
    }


def _loaded(model: str, options: TuneOptions) -> tuple[Loaded, WeMask | None]:
    """The plain model, and the mask that was saved with it unless it is not wanted."""
    from melayer.interventions.mask import WeMask

    loading = options.model.loading()
    if "LOCAL_RANK" in os.environ and loading["device"] == "auto" and loading["device_map"] is None:
        loading["device"] = "cpu"  # the trainer of each process puts it where it belongs
    loaded = load(model, loading)
    if loaded.mask is not None:
        # The trainer applies it itself, so that it can leave it off where the reference runs.
        WeMask.detach(loaded.model)
    return loaded, loaded.mask


def _mask(
    loaded: Loaded, model: str, shared: dict[str, Any], options: TuneOptions, blocks: list[range] | None
) -> WeMask:
    from melayer.interventions.mask import WeMask
    from melayer.measurements.locate.locate import locate

    fields = _fields(options)
    if blocks is not None:
        fields["layers"] = tuple(resolved(blocks, loaded, shared["parts"]) or ())
        if options.masking.positions == "first":
            return WeMask(**fields)
    with progress("Locating") as part:
        located = locate(loaded.model, loaded.tokenizer, **shared, name=model, progress=part(0))
    return WeMask.from_located(located, **fields)
