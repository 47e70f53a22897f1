"""Metrics that are code on the hub: fetched and run by `evaluate.load` alone, and here only if that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from melayer.errors import InputError


@contextmanager
def hub_code(allowed: bool) -> Iterator[list[str]]:
    """Inside, `evaluate.load` runs nothing unless it is allowed to; gives the names of what was refused.

    `evaluate` takes a metric's name to a Python file, of the working directory or of the hub, and runs it without a
    question. lm-eval's own metrics and tasks are those of the package that is installed.

    Args:
        allowed: Whether code from the hub may run.
    """
    import evaluate

    refused: list[str] = []
    if allowed:
        yield refused
        return

    def load(path: str, *_: Any, **__: Any) -> Any:
        refused.append(str(path))
        raise InputError(hub_metric(path))

    kept, evaluate.load = evaluate.load, load
    try:
        yield refused
    finally:
        evaluate.load = kept


def hub_metric(name: str) -> str:
    """What is said of a metric that was refused."""
    return (
        f"The metric {name!r} is a program from the hub, which is not run unasked. Give --trust-remote-code "
        "(load_tasks(trust_remote_code=True)) if you trust it."
    )
