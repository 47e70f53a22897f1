"""The directory of a training run: what it says of itself, its log, and whether a run may go on there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from melayer.errors import InputError, OutputError
from melayer.loading import adapters
from melayer.runs import atomic, jsonl
from melayer.tuning import checkpoints
from melayer.tuning.checkpoints import Checkpoint
from melayer.tuning.settings import TuneSettings
from melayer.version import __version__

FILE = adapters.RUN_FILE
"""What a run says of itself: written when it begins, and whole when it is finished."""
LOG = "log.jsonl"
"""What the trainer measured, a line each."""


def read_log(out: Path) -> list[dict[str, Any]]:
    """Each whole line of a run's log; none where there is no log."""
    return [json.loads(line) for line in jsonl.whole_lines(out / LOG)]


def add_to_log(out: Path, line: dict[str, Any]) -> None:
    """Adds a line to a run's log, on the disk before this returns.

    Raises:
        OutputError: It cannot be written.
    """
    with jsonl.keeping("log", out / LOG):
        jsonl.append(out / LOG, [line])


def opened(out: Path, settings: TuneSettings, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from, if any; nothing is changed yet.

    Raises:
        InputError: The directory holds another run, or there is nothing to go on from.
        OutputError: It cannot be written.
    """
    try:
        atomic.require_writable(out)
    except OSError as error:
        raise OutputError(f"Nothing can be written to {out}: {error.strerror}. Give another directory.") from error
    there = _recorded(out / FILE)
    if not resume:
        _check_new(out, there)
        return None
    if there is None:
        raise InputError(f"There is no run in {out} to go on with. Leave resume (--resume) out.")
    if there.get("status") == "finished":
        raise InputError(f"The run in {out} is finished. Load it with melayer.load({str(out)!r}).")
    differing = _differing(there["settings"], settings)
    if differing:
        raise InputError(
            f"The run in {out} was started with other settings: {', '.join(differing)}. Go on with the same, or begin "
            "a new run in another directory."
        )
    found = checkpoints.last(out)
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
        jsonl.replace(out / LOG, kept)


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


def _recorded(path: Path) -> Any:
    """What a run said of itself; None where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Give another directory.") from error


def _check_new(out: Path, there: Any) -> None:
    if there is not None:
        how = "and finished" if there.get("status") == "finished" else "that was stopped; go on with --resume"
        raise InputError(f"{out} holds a run already, {how}. Give another directory with --out.")
    if (out / "config.json").exists() or (out / "adapter_config.json").exists():
        raise InputError(f"{out} holds a model. Give another directory with --out.")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """The settings that are not the same, by their names."""
    now = json.loads(json.dumps(now))
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
    text = json.dumps(plain(values), ensure_ascii=False, indent=1)
    try:
        atomic.write_text(out / FILE, text)
    except OSError as error:
        raise OutputError(f"The run cannot be recorded in {out}: {error.strerror}. Make room there.") from error


def plain(values: Any) -> Any:
    """Values that JSON can hold; sets, which adapters' configs have, in order."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (set, frozenset)):
        return sorted(map(plain, values))
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return values if isinstance(values, (str, int, float, bool, type(None))) else str(values)
