"""What the command `scan` does once its options are parsed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from melayer.cli.options import ScanOptions, resolved
from melayer.cli.session import load, own_device, progress, stopped_by_term
from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded
    from melayer.interventions.mask import WeMask


@dataclass(frozen=True)
class AskedMask:
    """The mask under which the errors are measured too."""

    rate: float | None
    selector: str
    strength: float
    blocks: list[range] | None
    seed: int

    def fields(self) -> dict[str, Any]:
        """The fields of a WeMask."""
        return {"rate": self.rate, "selector": self.selector, "strength": self.strength, "seed": self.seed}

    def check(self) -> None:
        """Raises InputError for whatever is wrong before a model is loaded."""
        from melayer.interventions.mask import WeMask

        if self.rate is not None:
            WeMask(**self.fields(), me_layer=0)

    def made(self, loaded: Loaded, name: str, given: dict[str, Any]) -> WeMask | None:
        """The mask for this model."""
        if self.rate is None:
            return None
        if loaded.mask is not None:
            raise InputError(
                "A mask that was saved with the model is applied already, so none can be added. Leave --mask-rate out, "
                "or give --no-mask."
            )
        from melayer.interventions.mask import WeMask
        from melayer.measurements.locate.locate import locate

        if self.blocks is not None:
            return WeMask(**self.fields(), layers=tuple(resolved(self.blocks, loaded, given["parts"]) or ()))
        with progress("Locating") as part:
            located = locate(
                loaded.model,
                loaded.tokenizer,
                bos=given["bos"],
                criterion=given["criterion"],
                parts=given["parts"],
                name=name,
                progress=part(0),
            )
        return WeMask.from_located(located, **self.fields())


def run_scan(
    model: str,
    data: str,
    asked: AskedMask,
    options: ScanOptions,
    *,
    sites: Sequence[str] | None,
    formats: Sequence[str],
    out: Path | None,
    checkpoint_seconds: float,
) -> None:
    """Loads, scans under a bar, prints; of several processes the first alone prints."""
    from melayer.census.observe import SITES
    from melayer.census.report import write_scan_report
    from melayer.census.scan import check, scan
    from melayer.census.table import show_scan
    from melayer.presentation.page import check_writable

    given = options.arguments()
    corpus = options.corpus.corpus(data)
    asked.check()
    check(SITES if sites is None else sites, formats, asked.rate is not None, given["limit"])
    corpus.check()
    if out is not None:
        check_writable(out)
    loading = options.model.loading()
    loaded = load(model, {**loading, **own_device(loading)})
    mask = asked.made(loaded, model, given)
    with stopped_by_term(out), progress("Scanning", unit="documents") as part:
        result = scan(
            loaded.model,
            loaded.tokenizer,
            corpus,
            sites=SITES if sites is None else sites,
            formats=formats,
            mask=mask,
            store=out,
            checkpoint_seconds=checkpoint_seconds,
            name=model,
            progress=part(0),
            **given,
        )
    if result is None:
        return
    written = None if out is None else write_scan_report(result, out, command=shlex.join(["melayer", *sys.argv[1:]]))
    if options.output.as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False))
        return
    show_scan(result, Console())
    if written is not None:
        output = Console(soft_wrap=True, highlight=False)
        output.print(f"Open {written.html} in a browser; {written.json} holds the same figures.", markup=False)
