"""What the command `quant-check` does once its options are parsed."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from melayer.cli.options import Options, blocks_of, resolved
from melayer.cli.session import load, progress
from melayer.errors import InputError


def run_quant_check(
    model: str,
    options: Options,
    *,
    calibration: Path | None,
    prefix: str | None,
    layers: str | None,
    out: Path | None,
    given: dict[str, Any],
) -> None:
    """Loads, measures under a bar, writes, prints."""
    from melayer.data.texts import read_texts
    from melayer.interventions.mask import WeMask
    from melayer.presentation.page import check_writable
    from melayer.quantisation.choices import Choices
    from melayer.quantisation.quant_check import FILE, quant_check
    from melayer.quantisation.report import write_quant_report
    from melayer.quantisation.table import show_quant_check

    # Whatever is wrong with these is wrong before the model is loaded, too.
    Choices.of(given["formats"], given["granularities"], given["treatments"])
    chosen = {key: given[key] for key in ("rate", "selector", "strength", "seed")}
    WeMask(**chosen, me_layer=0)
    shared, blocks = options.arguments(), blocks_of("--layers", layers)
    held = None if calibration is None else read_texts(calibration, whole=options.texts.whole_file)
    if out is not None:
        check_writable(out)
    loaded = load(model, options.model.loading())
    ids = None
    if prefix is not None:
        ids = loaded.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"--prefix {prefix!r} gives no tokens. Give the text that every sequence begins with.")
    with progress("Quantising") as part:
        result = quant_check(
            loaded.model,
            loaded.tokenizer,
            **shared,
            **given,
            calibration=held,
            prefix=ids,
            layers=resolved(blocks, loaded, shared["parts"]),
            name=model,
            resume=None if out is None else out / FILE,
            progress=part(0),
        )
    written = None
    if out is not None:
        result.save(out)
        written = write_quant_report(result, out, command=shlex.join(["melayer", *sys.argv[1:]]))
    if options.output.as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
        return
    show_quant_check(result, Console())
    if written is not None:
        output = Console(soft_wrap=True, highlight=False)
        output.print(
            f"Open {written.html} in a browser; {written.json} holds the same figures. The scales are in "
            f"{written.json.parent / 'scales.safetensors'}, each baked prefix in a directory of its treatment's name.",
            markup=False,
        )
