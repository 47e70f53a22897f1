"""The commands that train, and that compare what training has moved: tune and contrast."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melayer.cli.options import Epsilon, FirstTokens, Model, Options, flat
from melayer.cli.output import answer, command_line, require_writable, written_or_shown
from melayer.cli.session import Advance, load, progress
from melayer.cli.tuning_options import TuneOptions
from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.cli.masks import MaskRequest
    from melayer.interventions.load import Loaded
    from melayer.interventions.mask import WeMask
    from melayer.studies.contrast.result import Measured
    from melayer.tuning.rows import Method

commands = typer.Typer()

tune_app = typer.Typer(
    help="Fine-tune with the mask on, wherever the policy runs: SFT, DPO, GRPO.", no_args_is_help=True
)

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
    _tune("sft", model, data, out, options)


@tune_app.command("dpo")
@flat
def dpo_command(
    model: Model, data: Data, out: Out, reference: ReferenceOption = "masked", *, options: TuneOptions
) -> None:
    """Learn from pairs of a chosen and a rejected answer.

    Example: [bold]melayer tune dpo demo --data pairs.jsonl --out tuned --mask-rate 0.3 --lora[/]
    """
    _tune("dpo", model, data, out, options, reference=reference)


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
    _tune("grpo", model, data, out, options, reference=reference, instruction=instruction)


@commands.command("contrast")
@flat
def contrast_command(
    before: Annotated[str, typer.Argument(help="A model, as for the other commands.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Another, e.g. what `tune` made of it.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Directory for a page.")] = None,
    T: Annotated[int, typer.Option("--T", "-T", help="Tokens in each sequence for the sinks.")] = 64,
    epsilon: Epsilon = 0.3,
    n_first_tokens: FirstTokens = 64,
    *,
    options: Options,
) -> None:
    """Locate, rigidity and sinks of two models on the same texts: what training has moved.

    Where the second model carries a mask, both are measured without it and with it, and the change is split.

    Example: [bold]melayer contrast demo tuned --out demo-contrast[/]
    """
    from melayer.studies.contrast.contrast import contrast
    from melayer.studies.contrast.report import write_contrast_report
    from melayer.studies.contrast.table import show_contrast

    arguments = {**options.arguments(), "T": T, "epsilon": epsilon, "n_first_tokens": n_first_tokens}
    require_writable(out)
    # The second one first: its mask is wanted for both.
    second, second_masked = _measured(after, options, arguments, None)
    mask = None if second_masked is None else second_masked.mask
    first, first_masked = _measured(before, options, arguments, mask, own=False)
    result = contrast(first, second, before_masked=first_masked, after_masked=second_masked)
    shown = (options.output.as_json, result.to_dict, lambda to: show_contrast(result, to))
    written = None
    if out is not None:
        written = written_or_shown(lambda: write_contrast_report(result, out, command=command_line()), *shown)
    answer(*shown, written)


def _measured(
    name: str, options: Options, arguments: dict[str, Any], mask: WeMask | None, *, own: bool = True
) -> tuple[Measured, Measured | None]:
    """One of the two without a mask, and under one if there is any; it is gone from memory when the other is loaded.

    Args:
        name: The model.
        options: How to load it.
        arguments: Of `measure`.
        mask: Another model's mask.
        own: Whether it is measured under the mask that was saved with it, instead.
    """
    from melayer.studies.contrast.contrast import fitted, measure

    loaded = load(name, options.model.loading())
    if loaded.mask is not None:
        loaded.mask.detach(loaded.model)
    if own:
        mask = loaded.mask
    measurements = "Locating", "Measuring rigidity", "Measuring sinks"
    with progress(*measurements) as part:
        plain = measure(loaded.model, loaded.tokenizer, **arguments, name=name, part=part)
    if loaded.mask is not None and not own:
        note = "The mask saved with it is left out: figures under a mask are under that of the second model."
        plain = replace(plain, notes=(*plain.notes, note))
    mask = None if mask is None else fitted(mask, loaded.model, plain, parts=arguments["parts"])
    masked = None
    if mask is not None:
        with progress(*measurements) as part, mask.apply(loaded.model, parts=arguments["parts"]):
            masked = measure(loaded.model, loaded.tokenizer, **arguments, mask=mask, name=name, part=part)
    del loaded
    gc.collect()
    return plain, masked


def _tune(method: Method, model: str, data: str, out: Path, options: TuneOptions, **more: Any) -> None:
    """Loads, locates where a mask is asked for, trains under a bar, prints; only the first process of several."""
    from melayer.tuning import run as training

    training.check_installed()
    shared, chosen = options.arguments(), options.training
    arguments = {**options.rows.arguments(), **more}
    request = options.masking.request(chosen.seed)
    config = _checked_config(method, options, request)
    import datasets

    datasets.disable_progress_bars()
    loaded, saved = _loaded(model, options)
    mask = saved
    if request.rate is not None:
        if saved is not None:
            raise InputError(
                f"{model} comes with a mask, which is on in training too. Leave --mask-rate out, or give --no-mask."
            )
        mask = request.made(loaded, model, shared)
    from melayer.tuning import tune

    arguments |= {
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
        train = getattr(tune, method)
        result = train(loaded.model, loaded.tokenizer, data, **arguments, progress=_with_figures(part(0)))
    if os.environ.get("RANK", "0") != "0":
        return
    from melayer.tuning.report import write_tune_report
    from melayer.tuning.run_directory import plain
    from melayer.tuning.table import show_tune

    history = result.history()
    answer(
        options.output.as_json,
        lambda: dict(plain(result.to_dict())),
        lambda to: show_tune(result, history, to),
        write_tune_report(result, history, command=command_line()),
        before=f"The model is in {out}: melayer eval {out} ... takes it, mask included.",
    )


def _checked_config(method: Method, options: TuneOptions, request: MaskRequest) -> dict[str, Any]:
    """The trainer's options; raises InputError for whatever is wrong before a model is loaded."""
    from melayer.tuning import config as training_config

    request.check()
    if request.rate is None and request.blocks is not None:
        raise InputError("--layers says which blocks are masked, but there is no mask. Add --mask-rate.")
    chosen = options.training
    training_config.check(method, {"seed": chosen.seed}, masked=False)
    config = {} if chosen.config is None else training_config.read(chosen.config)
    return training_config.check(method, {**config, **chosen.overrides()}, masked=request.rate is not None)


def _with_figures(advance: Advance) -> Any:
    """What a trainer reports to: the bar, with the reward or the loss beside it."""

    def report(done: int, total: int, figures: Mapping[str, float]) -> None:
        key = next((key for key in ("reward", "loss", "eval_loss") if key in figures), None)
        advance(done, total, "" if key is None else f"{key.removeprefix('eval_')} {figures[key]:.4g}")

    return report


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
