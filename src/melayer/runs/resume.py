"""What is finished of a long measurement, a line each in a file, so that the same call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from melayer.errors import InputError
from melayer.runs import jsonl

T = TypeVar("T")


def begun(path: Path, what: str, subject: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> list[T]:
    """What the file holds; it is made if it is missing, and a last line that was cut off is dropped.

    Args:
        path: The file.
        what: The measurement's name, for messages and the file's first line.
        subject: What its figures depend on; a file with another one is refused.
        read: Makes of a line what it was.

    Raises:
        InputError: It is of another subject, or of no such measurement.
        OutputError: It cannot be read or written.
    """
    subject, head_key = json.loads(json.dumps(subject)), f"{what.replace('-', '_')}_of"
    with jsonl.keeping(what, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = jsonl.mend(path)
        if len(lines) < 2:  # nothing is finished, so that nothing can be lost
            path.write_bytes(b"")
            jsonl.append(path, [{head_key: subject}])
            return []
    try:
        head, *values = map(json.loads, lines)
        found = dict(head[head_key])
        finished = [read(value) for value in values]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no {what} that can be read. Give another place, or remove it.") from error
    differing = sorted(key for key in subject | found if subject.get(key) != found.get(key))
    if differing:
        raise InputError(
            f"{path} is of another {what}: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}. "
            "Give another place, or remove it."
        )
    return finished


def keep(path: Path, what: str, value: dict[str, Any]) -> None:
    """Adds what is finished, on the disk before this returns.

    Raises:
        OutputError: It cannot be written.
    """
    with jsonl.keeping(what, path):
        jsonl.append(path, [value])
