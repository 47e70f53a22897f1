"""A command on something hostile: in a process of its own, with everything watched that it may not touch."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import typer

import children
import small_benchmarks
import small_runs
import stored_answers
import toys
from melayer import cli

PATIENCE = 120.0
"""Seconds that a command may take on something hostile; it takes one or two where nothing else runs."""
MEMORY = 8 << 30
"""Bytes that a command may hold on something hostile: what goes beyond fails here, and not the machine."""
LINES = 3
"""Lines that a command may say on stderr."""
TEXT = toys.text(20, x_at=4)
# In none of these does a command measure anything large.
QUICK: dict[str, list[str]] = {
    "--text": [TEXT, toys.text(16, x_at=0, seed=1)],
    "--prompt": ["X w1 w2"],
    "--T": ["16"],
    "--n-first-tokens": ["4"],
    "--max-new-tokens": ["4"],
    "--max-length": ["128"],
    "--rates": ["0.5"],
    "--selectors": ["weight"],
    "--seeds": ["1"],
    "--max-texts": ["1"],
    "--formats": ["int8"],
    "--granularities": ["per-tensor"],
    "--treatments": ["plain"],
    "--n-sequences": ["2"],
    "--tasks": ["gsm8k"],
    "--items": ["2"],
    "--fewshot": ["0"],
    "--comparators": ["set-zero"],
    "--steps": ["1"],
    "--batch-size": ["8"],
}
DATA = {"eval": "benchmarks", "scan": "texts", "tune sft": "answers", "tune dpo": "pairs", "tune grpo": "problems"}
"""What `--data` is for each command that has it: a new one says here what it reads."""


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[Any]]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from _commands(inner, (*path, name))
    else:
        yield " ".join(path), list(command.params)


COMMANDS: dict[str, list[Any]] = dict(_commands(typer.main.get_command(cli.app)))
"""Every command with its parameters, found by walking the tree, so that new ones are taken in by themselves."""


def arguments_of(name: str) -> list[str]:
    """The names of a command's arguments, in order."""
    return [one.name for one in COMMANDS[name] if one.param_type_name == "argument"]


def options_of(name: str) -> list[str]:
    """The longest spelling of each option of a command."""
    return [max(one.opts, key=len) for one in COMMANDS[name] if one.param_type_name == "option"]


def taking(*parameters: str) -> list[str]:
    """The commands that have one of these arguments or options."""
    return [name for name in COMMANDS if {*arguments_of(name), *options_of(name)} & {*parameters}]


@dataclass(frozen=True)
class Setting:
    """What is good of everything that a command takes, so that one thing at a time can be bad."""

    root: Path
    good: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def made(cls, root: Path) -> Setting:
        """Writes a model, benchmarks, rows and a corpus below `root`."""
        model = root / "model"
        small_runs.model().save_pretrained(model)
        tokenizer = toys.tokenizer()
        tokenizer.save_pretrained(model)
        good = {"model": model, "benchmarks": small_benchmarks.write(root / "benchmarks")}
        rows = {"answers": small_runs.answers(), "pairs": small_runs.pairs(), "problems": small_runs.problems()}
        rows["texts"] = [{"text": toys.text(20, x_at=3, seed=seed)} for seed in range(4)]
        for name, kept in rows.items():
            good[name] = root / f"{name}.jsonl"
            good[name].write_text("".join(json.dumps(row) + "\n" for row in kept))
        good["config"] = root / "config.yaml"
        good["config"].write_text("max_completion_length: 8\n")
        for name in arguments_of("compare"):
            good[name] = root / name
            variants = ["plain", "masked"]
            made = stored_answers.settings({"gsm8k": {"exact_match": stored_answers.metric("binary")}}, variants)
            rows = [
                stored_answers.answer("gsm8k", variant, place, exact_match=[float(place % 2), 1])
                for variant in variants
                for place in range(4)
            ]
            stored_answers.write(good[name], made, rows)
        return cls(root, good)

    def line(self, name: str, out: Path, bad: Mapping[str, Path | str], *, as_json: bool = True) -> list[str]:
        """A command line of `name` that works, but for what is given as `bad`, by argument or option."""
        line = name.split()
        for argument in arguments_of(name):
            line.append(str(bad.get(argument, self.good.get(argument, self.good["model"]))))
        for option in options_of(name):
            if option in bad:
                line += [option, str(bad[option])]
            elif option == "--out":
                line += [option, str(out)]
            elif option == "--data":
                line += [option, str(self.good[DATA[name]])]
            elif option == "--config" and name == "tune grpo":
                line += [option, str(self.good["config"])]
            elif option == "--json" and as_json:
                line.append(option)
            elif not (option == "--text" and "--file" in bad):
                for value in QUICK.get(option, []):
                    line += [option, value]
        return line


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    line: list[str]
    code: int
    stdout: str
    stderr: str
    new: list[str]
    """Files and directories that were not there before, anywhere but in the place for its results."""
    in_out: list[str]
    """Those in the place for its results."""
    changed: list[str]
    """What was there before and is gone or another."""


def run(line: Sequence[str], place: Path, out: Path, watched: Sequence[Path], stdin: str = "y\n" * 50) -> Ran:
    """Runs a command line in a process of its own.

    Args:
        line: What is typed behind `melayer`.
        place: An empty directory: the process's working directory, temporary files, cache and home lie in it.
        out: The place for its results, which may be there already.
        watched: What nobody may change, beside what lies in `out`.
        stdin: What somebody types when asked.
    """
    places = {name: place / name for name in ("home", "tmp", "cache", "work")}
    for made in places.values():
        made.mkdir(parents=True)
    typed = place / "stdin"
    typed.write_text(stdin)
    before = {path: snapshot(path) for path in [*watched, out]}
    said = place / "stdout"
    process = children.started(
        _typed,
        list(line),
        typed,
        places["work"],
        output=said,
        HOME=str(places["home"]),
        TMPDIR=str(places["tmp"]),
        MELAYER_CACHE=str(places["cache"]),
        HF_DATASETS_CACHE=str(places["cache"] / "datasets"),
        COLUMNS="200",
    )
    process.join(PATIENCE)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        raise AssertionError(f"{' '.join(line)} takes over {PATIENCE:.0f} s")
    after = {path: snapshot(path) for path in before}
    changed = [f"{path}/{name}" for path, was in before.items() for name in was if after[path].get(name) != was[name]]
    new = [f"{path}/{name}" for path in watched for name in after[path] if name not in before[path]]
    for name in ("tmp", "work", "home"):
        new += [f"{name}/{left}" for left in snapshot(places[name])]
    new += [f"cache/{left}" for left in snapshot(places["cache"]) if "tmp" in left or ".melayer-" in left]
    return Ran(
        list(line),
        code,
        said.read_bytes().decode("utf-8", "replace"),
        children.errors_of(said).read_bytes().decode("utf-8", "replace"),
        new,
        [name for name in after[out] if name not in before[out]],
        changed,
    )


def require_polite(ran: Ran) -> None:
    """What holds for every command on everything that is hostile."""
    said = f"{' '.join(ran.line)}\n{ran.code}\n{ran.stderr[-3000:]}"
    assert ran.code in (0, 2), said
    assert "Traceback" not in ran.stderr, said
    assert len([line for line in ran.stderr.splitlines() if line.strip()]) <= LINES, said
    assert not ran.changed, f"{ran.changed} changed: {said}"
    assert not ran.new, f"{ran.new} left over: {said}"
    assert not [name for name in ran.in_out if ".tmp" in name or ".melayer-" in name], f"{ran.in_out}: {said}"
    if ran.code == 2:
        assert ran.stderr.startswith("melayer: ") or "Note: " in ran.stderr or "Error" in ran.stderr, said
        assert ran.stdout == "", f"{said}\n{ran.stdout[:500]}"
        assert not ran.in_out, f"{ran.in_out} half written: {said}"
    elif "--json" in ran.line:
        json.loads(ran.stdout, parse_constant=_refused)


def snapshot(path: Path) -> dict[str, tuple[Any, ...]]:
    """What lies at a path: of each file its content, of each link where it goes, of the rest what it is."""
    if not os.path.lexists(path):
        return {}
    found = {}
    for one in [path, *sorted(path.rglob("*"))] if path.is_dir() and not path.is_symlink() else [path]:
        about = one.lstat()
        name = str(one.relative_to(path)) if one != path else "."
        if stat.S_ISREG(about.st_mode):
            found[name] = ("file", about.st_mode, hashlib.sha256(one.read_bytes()).hexdigest())
        elif stat.S_ISLNK(about.st_mode):
            found[name] = ("link", os.readlink(one))  # noqa: PTH115 - also of one that goes nowhere
        elif not (stat.S_ISDIR(about.st_mode) and one == path):
            found[name] = ("other", stat.S_IFMT(about.st_mode))
    return found


def copied(thing: Path, to: Path) -> Path:
    """A copy that a command may do to as it likes."""
    return Path(shutil.copytree(thing, to, symlinks=True))


def _typed(line: list[str], stdin: Path, work: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.chdir(work)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # it was read from the environment long before
    handle = os.open(stdin, os.O_RDONLY)
    os.dup2(handle, 0)
    sys.stdin = os.fdopen(0)
    sys.argv = ["melayer", *line]
    cli.main()


def _refused(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
