"""The command line: parse, call, print. Data on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from melayer.errors import InputError, MelayerError, MelayerWarning
from melayer.version import __version__

if TYPE_CHECKING:
    from melayer.locate import LocateResult
    from melayer.models import Loaded

app = typer.Typer(
    name="melayer",
    help="Find, explain, measure and relax massive activations in language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class DType(str, Enum):
    """The dtypes that weights can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_MODEL, _TEXTS, _CRITERION = "Model", "Texts", "Criterion"

Model = Annotated[str, typer.Argument(help="`demo`, a directory, a .gguf file or a hub id.", show_default=False)]
DTypeOption = Annotated[DType, typer.Option(help="auto: the checkpoint's own.", rich_help_panel=_MODEL)]
Device = Annotated[str, typer.Option(help="auto: CUDA, else MPS, else CPU.", rich_help_panel=_MODEL)]
DeviceMap = Annotated[
    str | None, typer.Option(help="Spread the model over devices, e.g. auto.", rich_help_panel=_MODEL)
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights: runs code in them.", rich_help_panel=_MODEL)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own code.", rich_help_panel=_MODEL)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL)]
Part = Annotated[
    list[str] | None,
    typer.Option(help="Name a part that is not found, e.g. ffn=feed_forward.", rich_help_panel=_MODEL),
]
Text = Annotated[list[str] | None, typer.Option(help="A text to run; repeatable.", rich_help_panel=_TEXTS)]
File = Annotated[Path | None, typer.Option(help="A UTF-8 file of texts, one a line.", rich_help_panel=_TEXTS)]
WholeFile = Annotated[bool, typer.Option("--whole-file", help="Take --file as one text.", rich_help_panel=_TEXTS)]
Limit = Annotated[int | None, typer.Option(min=1, help="Run only the first texts.", rich_help_panel=_TEXTS)]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens kept of each text; default 512, or the model's positions.", rich_help_panel=_TEXTS),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin-of-sequence token; default: the tokenizer's way.",
        rich_help_panel=_TEXTS,
    ),
]
MaxBatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in one forward pass.", rich_help_panel=_TEXTS)]
MinAbs = Annotated[float, typer.Option(help="|h| must exceed this.", rich_help_panel=_CRITERION)]
MinRatio = Annotated[float, typer.Option(help="…and this many medians.", rich_help_panel=_CRITERION)]
Persistence = Annotated[float, typer.Option(help="Share of the blocks it must last for.", rich_help_panel=_CRITERION)]
Majority = Annotated[float, typer.Option(help="Share of the texts to exceed.", rich_help_panel=_CRITERION)]
MinTokens = Annotated[int, typer.Option(help="Shorter texts do not vote.", rich_help_panel=_CRITERION)]
MaxListed = Annotated[
    int, typer.Option(min=1, help="Massive scalars listed a text and block.", rich_help_panel=_CRITERION)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]


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
def locate_command(
    model: Model,
    text: Text = None,
    file: File = None,
    whole_file: WholeFile = False,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    bos: Bos = None,
    max_batch_tokens: MaxBatchTokens = 2048,
    min_abs: MinAbs = 100.0,
    min_ratio: MinRatio = 1000.0,
    persistence: Persistence = 0.25,
    majority: Majority = 0.5,
    min_tokens: MinTokens = 8,
    max_listed: MaxListed = 16,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    part: Part = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the block where the massive activation emerges.

    Example: [bold]melayer locate demo --text "My favorite color is Dark Blue. The sky is clear today."[/]
    """
    with _session(debug):
        options = _locate_options(locals())
        loaded = _load(model, dtype, device, device_map, allow_pickle, trust_remote_code, revision)
        result = _locate(loaded, model, options)
        if as_json:
            typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
        else:
            from melayer.terminal import show_locate

            show_locate(result, Console())


@app.command("report")
def report_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for report.html and report.json.", show_default=False)],
    text: Text = None,
    file: File = None,
    whole_file: WholeFile = False,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    bos: Bos = None,
    max_batch_tokens: MaxBatchTokens = 2048,
    min_abs: MinAbs = 100.0,
    min_ratio: MinRatio = 1000.0,
    persistence: Persistence = 0.25,
    majority: Majority = 0.5,
    min_tokens: MinTokens = 8,
    max_listed: MaxListed = 16,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    device_map: DeviceMap = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    part: Part = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model and write a page to look at.

    Example: [bold]melayer report demo --out demo-report[/]
    """
    with _session(debug):
        from melayer.report import check_writable, write_report

        options = _locate_options(locals())
        check_writable(out)
        loaded = _load(model, dtype, device, device_map, allow_pickle, trust_remote_code, revision)
        result = _locate(loaded, model, options)
        from melayer.models import weight_hashes

        with _console().status("Writing the report"):
            written = write_report(
                result,
                out,
                command=shlex.join(["melayer", *sys.argv[1:]]),
                device=str(loaded.model.device),
                weights=weight_hashes(loaded.model, model),
            )
        if as_json:
            typer.echo(written.json.read_text(encoding="utf-8"))
        else:
            output = Console(soft_wrap=True, highlight=False)
            output.print(result.sentence, markup=False)
            output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)


# --- what the commands share --------------------------------------------------------------------------------------


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def _locate_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `locate` from those of a command; whatever can be wrong with them is found before loading."""
    from melayer.inputs import read_texts
    from melayer.locate import Criterion

    texts: list[str] = list(given["text"] or [])
    if given["file"] is not None:
        texts += read_texts(given["file"], whole=given["whole_file"])
    elif given["whole_file"]:
        raise InputError("--whole-file says how to read a file, but no --file was given. Add --file PATH.")
    for index, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"Text {index} is empty. Give texts with at least one word.")
    if not texts:
        from melayer.inputs import builtin_texts

        texts = builtin_texts() if given["limit"] is not None else []
    return {
        "texts": texts[: given["limit"]] or None,
        "max_tokens": given["max_tokens"],
        "bos": given["bos"],
        "max_batch_tokens": given["max_batch_tokens"],
        "max_listed": given["max_listed"],
        "parts": _parts(given["part"]),
        "criterion": Criterion(
            **{name: given[name] for name in ("min_abs", "min_ratio", "persistence", "majority", "min_tokens")}
        ),
    }


def _parts(given: list[str] | None) -> dict[str, str]:
    parts = {}
    for item in given or []:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise InputError(f"--part {item!r} was given; expected NAME=PATH, for example ffn=feed_forward.")
        parts[name] = path
    return parts


def _load(
    model: str,
    dtype: DType,
    device: str,
    device_map: str | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    revision: str | None,
) -> Loaded:
    with _console().status(f"Loading {model} (a GGUF file is unpacked once, which takes half a minute)"):
        # What transformers says while it loads is for its own users; what matters comes back as our errors.
        from transformers.utils import logging

        from melayer.models import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load(
            model,
            dtype=dtype.value,
            device=device,
            device_map=device_map,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )


def _locate(loaded: Loaded, name: str, options: dict[str, Any]) -> LocateResult:
    from melayer.locate import locate

    with _progress("Locating", "tokens") as advance:
        return locate(loaded.model, loaded.tokenizer, name=name, progress=advance, **options)


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the rate and the remaining time; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, {{task.fields[rate]}}"),
        TimeRemainingColumn(),
    )
    console = _console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, rate="")

        def advance(done: int, total: int) -> None:
            elapsed = bar.tasks[0].elapsed
            rate = f"{done / elapsed:,.0f}/s" if elapsed else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


@contextmanager
def _session(debug: bool) -> Iterator[None]:
    """Turns our errors into a sentence and exit code 2, and our warnings into a line."""
    console = _console()
    # Before tqdm is imported, which reads it then: transformers draws bars of its own while it unpacks a GGUF file.
    os.environ.setdefault("TQDM_DISABLE", "1")

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, MelayerWarning):
            console.print(f"Note: {message}", markup=False)
        else:
            shown(message, category, *rest, **more)

    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", MelayerWarning)
        warnings.showwarning = show
        try:
            yield
        except MelayerError as error:
            if debug:
                traceback.print_exc()
            console.print(f"melayer: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error


def main() -> None:
    """The entry point of the `melayer` command."""
    app()
