"""Things of others, and damaged things of ours, where commands keep what is theirs.

`STORES` maps a name to a function that makes one of them in a directory which a command then gets as --out; `found`
says what is in a directory, so that a test can see that nothing of it was changed.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Builder = Callable[[Path], None]

FILES = (
    "sweep.jsonl",
    "quant-check.jsonl",
    "eval.jsonl",
    "eval.rank1.jsonl",
    "scan.0.state",
    "scan.7.state",
    "report.html",
    "report.json",
    "melayer_tune.json",
    "log.jsonl",
    "melayer_mask.json",
    "scales.json",
    "scales.safetensors",
    "baked/prefix.json",
    "baked+mask/melayer_mask.json",
)
"""Where commands keep what is theirs, in the directory that they are given."""

DIRECTORIES = (".unfinished", "checkpoint-1", "baked", "baked+mask")
"""The directories in which they do."""

NOTE = b"Call the dentist on Tuesday.\n"
LINES = b'{"milk": 2}\n{"bread": 1}\n{"eggs": 12'
"""Somebody's own JSON lines, the last of which is not finished (yet)."""


def _content(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _elsewhere(path: Path) -> Path:
    """A place beside the directory, which no command is told of."""
    place = path.parent / "elsewhere"
    place.mkdir(exist_ok=True)
    return place / path.name


def _link(path: Path) -> None:
    target = _elsewhere(path)
    target.write_bytes(NOTE)
    path.symlink_to(target)


def _dangling(path: Path) -> None:
    path.symlink_to(_elsewhere(path))


def _hard_link(path: Path) -> None:
    target = _elsewhere(path)
    target.write_bytes(NOTE)
    path.hardlink_to(target)


def _read_only(path: Path) -> None:
    path.write_bytes(NOTE)
    path.chmod(0o444)


def _full_directory(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_bytes(b"\xff\xd8")


KINDS: dict[str, Builder] = {
    "a note": partial(_content, NOTE),
    "a note without an end": partial(_content, NOTE[:-1]),
    "lines": partial(_content, LINES),
    "nothing": partial(_content, b""),
    "zeros": partial(_content, bytes(4096)),
    "binary": partial(_content, bytes(range(256))),
    "a zip": partial(_content, b"PK\x03\x04 not whole"),
    "a number": partial(_content, b"7\n"),
    "null": partial(_content, b"null"),
    "an empty object": partial(_content, b"{}\n"),
    "a list of objects": partial(_content, b'[{"a": 1}]\n'),
    "deep brackets": partial(_content, b"[" * 100_000),
    "a version of the wrong type": partial(_content, b'{"version": "1", "melayer_version": 1}\n'),
    "a directory": _full_directory,
    "a pipe": os.mkfifo,
    "a link": _link,
    "a link to nothing": _dangling,
    "a hard link": _hard_link,
    "read-only": _read_only,
}
"""What can be there in place of a file of ours."""


def _of_ours(head: str, **values: Any) -> bytes:
    """A log that begins as ours do, of other settings or of fields that are not theirs."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in ({head: {"a": 1}}, values))


DAMAGED: dict[str, tuple[str, bytes]] = {
    "sweep.jsonl of another sweep": ("sweep.jsonl", _of_ours("sweep_of", point={"selector": None}, notes=[])),
    "sweep.jsonl of quant-check": ("sweep.jsonl", _of_ours("quant_check_of", setting={}, notes=[])),
    "quant-check.jsonl without fields": ("quant-check.jsonl", _of_ours("quant_check_of", setting={}, notes=[])),
    "eval.jsonl without fields": ("eval.jsonl", _of_ours("eval_of", task="gsm8k")),
    "eval.jsonl without settings": ("eval.jsonl", b'{"eval_of": {}}\n'),
    "eval.rank1.jsonl without fields": ("eval.rank1.jsonl", _of_ours("eval_of", task="gsm8k")),
    "melayer_tune.json without settings": (
        "melayer_tune.json",
        b'{"melayer_version": "0.0.1", "status": "running"}',
    ),
    "melayer_tune.json with settings that are none": (
        "melayer_tune.json",
        b'{"melayer_version": "0.0.1", "status": "running", "settings": 3}',
    ),
    "report.json of another command": (
        "report.json",
        b'{"melayer_version": "0.0.1", "provenance": {"command": "melayer nosuch x"}}',
    ),
}
"""What looks like ours and cannot be used: a file of the directory, and its content."""


def _place(directory: Path, name: str, make: Builder) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)


STORES: dict[str, Builder] = {
    **{
        f"{kind} at {name}": partial(_place, name=name, make=make)
        for name, (kind, make) in itertools.product(FILES, KINDS.items())
    },
    **{
        f"{kind} at {name}/": partial(_place, name=name, make=KINDS[kind])
        for name, kind in itertools.product(DIRECTORIES, ("a note", "a directory", "a link", "a link to nothing"))
    },
    **{name: partial(_place, name=at, make=partial(_content, content)) for name, (at, content) in DAMAGED.items()},
}
"""By name: makes it in a directory, which is made if it is missing."""


def found(directory: Path) -> dict[str, tuple[str, bytes]]:
    """What is in a directory: of each path its kind and mode, and its content or where it points to."""
    seen = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        seen[str(path.relative_to(directory))] = (stat.filemode(status.st_mode), content)
    return seen


def unchanged(before: dict[str, tuple[str, bytes]], directory: Path) -> bool:
    """Whether all that was there is there as it was; there may be more."""
    return before.items() <= found(directory).items()
