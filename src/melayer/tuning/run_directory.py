"""The directory of a training run: what it says of itself, its log, and whether a run may go on there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic reads those of `typing` from Python 3.12 on

from melayer.errors import InputError, OutputError, reason
from melayer.loading import adapters
from melayer.runs import atomic, jsonl, ours, records
from melayer.runs.json_text import json_text, writable
from melayer.tuning import checkpoints
from melayer.tuning.checkpoints import Checkpoint
from melayer.tuning.settings import TuneSettings
from melayer.version import __version__

FILE = adapters.RUN_FILE
"""What a run says of itself: written when it begins, and whole when it is finished."""
LOG = "log.jsonl"
"""What the trainer measured, a line each."""


class _Record(TypedDict):
    """What of a record a run is held to; it says more once the run is finished."""

    status: Literal["running", "finished"]
    settings: dict[str, Any]


def read_log(out: Path) -> list[dict[str, Any]]:
    """Each whole line of a run's log: `step` and figures; none where there is no log.

    Raises:
        InputError: A line is not as it was written.
        OutputError: It cannot be read.
    """
    said, todo = f"{out / LOG} is no log of a run", "Give another directory."
    lines = jsonl.read(out / LOG, said, todo).values
    for number, line in enumerate(lines, start=1):
        records.parse(json_text(line), dict[str, int | float | None], f"{said}: line {number}", todo)
        if not isinstance(line.get("step"), int):
            raise InputError(f"{said}: line {number} has no step. {todo}")
    return lines


def add_to_log(out: Path, line: dict[str, Any]) -> None:
    """Adds a line to a run's log, on the disk before this returns.

    Raises:
        OutputError: It cannot be written.
    """
    path = out / LOG
    with jsonl.keeping("log", path):
        if ours.is_there(path):
            jsonl.append(path, [line])
        else:
            jsonl.replace(path, [line])


def opened(out: Path, settings: TuneSettings, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, if any; nothing is changed yet.

    Raises:
        InputError: The directory holds another run, or there is nothing to go on from.
        OutputError: It cannot be written.
    """
    try:
        str(out).encode("utf-8")  # in which tokenizers take the names of files
        atomic.require_writable(out)
        ours.require([out / FILE])
    except (OSError, ValueError) as error:
        raise OutputError(f"Nothing can be written to {out}: {reason(error)}. Give another directory.") from error
    there = _recorded(out / FILE)
    if not resume:
        _check_new(out, there)
        return None
    if there is None:
        raise InputError(f"There is no run in {out} to go on with. Leave resume (--resume) out.")
    if there["status"] == "finished":
        raise InputError(f"The run in {out} is finished. Load it with melayer.load({str(out)!r}).")
    differing = _differing(there["settings"], settings)
    if differing:
        raise InputError(
            f"The run in {out} was started with other settings: {', '.join(differing)}. Go on with the same, or begin "
            "a new run in another directory."
        )
    ours.require([out / "report.html", out / "report.json"])
    checkpoints.require_ours(out)
    read_log(out)
    found = checkpoints.last(out)
    if found is not None:
        checkpoints.require_whole(found.path)
    if found is not None and not (found.path / "scheduler.pt").exists():
        raise InputError(f"{found.path} holds weights only (save_only_model), so the run cannot go on from it exactly.")
    return found


def begin(out: Path, settings: TuneSettings, checkpoint: Checkpoint | None, *, resume: bool) -> None:
    """Writes down what a new run is, or forgets what one that goes on will log again."""
    if not resume:
        record(out, {"melayer_version": __version__, "status": "running", "settings": settings})
        return
    step = 0 if checkpoint is None else checkpoint.step
    kept = [line for line in read_log(out) if line["step"] <= step and checkpoint is not None]
    with jsonl.keeping("log", out / LOG):
        jsonl.replace(out / LOG, kept, own=True)


@contextmanager
def kept_if_anything_is(out: Path) -> Iterator[None]:
    """Directories that were made for a run go away again where it fails and has left nothing in them."""
    missing = [path for path in (out, *out.parents) if not os.path.lexists(path)]
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # there is something in it
                path.rmdir()
        raise


def take_back(out: Path, *, log: bool) -> None:
    """Forgets a run that has learnt nothing, so that the same directory takes the next one.

    Args:
        out: Its directory.
        log: Whether the log is its own, and not one that was there before.
    """
    shutil.rmtree(out / checkpoints.STAGING, ignore_errors=True)
    for name in (FILE, *([LOG] if log else [])):
        (out / name).unlink(missing_ok=True)


def _recorded(path: Path) -> _Record | None:
    """What a run said of itself; None where there is none."""
    try:
        return records.read(path, _Record, f"{path} cannot be read as the record of a run", "Give another directory.")
    except FileNotFoundError:
        return None


def _check_new(out: Path, there: _Record | None) -> None:
    """Raises InputError where a new run would write over something."""
    if there is not None:
        if there["status"] == "running" and checkpoints.last(out) is None and not read_log(out):
            checkpoints.require_ours(out)
            return  # it failed before its first step, so that nothing can be lost
        how = "and finished" if there["status"] == "finished" else "that was stopped; go on with --resume"
        raise InputError(f"{out} holds a run already, {how}. Give another directory with --out.")
    if (out / "config.json").exists() or (out / "adapter_config.json").exists():
        raise InputError(f"{out} holds a model. Give another directory with --out.")
    names = sorted(path.name for path in out.iterdir() if checkpoints.is_claimed(path.name))
    if names:
        raise InputError(
            f"{out} holds {names[0]} already, which a run may have to write. Give another directory with --out."
        )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """The settings that are not the same, by their names."""
    now = writable(now)
    found = []
    for key in sorted({*before, *now}):
        left, right = before.get(key), now.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differing(left, right, f"{under}{key}.")
        elif left != right:
            found.append(
                f"{under}{key}" if isinstance(left or right, (dict, list)) else f"{under}{key} {left} → {right}"
            )
    return found


def record(out: Path, values: dict[str, Any]) -> None:
    """Writes what a run says of itself, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        atomic.write_text(out / FILE, json_text(plain(values), indent=1))
    except OSError as error:
        raise OutputError(f"The run cannot be recorded in {out}: {reason(error)}. Make room there.") from error


def plain(values: Any) -> Any:
    """Values that JSON can hold; sets, which adapters' configs have, in order."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (set, frozenset)):
        return sorted(map(plain, values))
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return values if isinstance(values, (str, int, float, bool, type(None))) else str(values)
