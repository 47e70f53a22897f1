"""Everything hostile, given to every command that can take it: an answer or a sentence, and nothing else happens.

A run of all tests takes every fourth thing with one command; `pytest tests/hostile --hostile=all` takes each thing with
each of its commands.
"""

import atexit
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import small_runs
import toys
from hostile import checkpoints, corpora, masks, running, stores


@dataclass(frozen=True)
class Kind:
    """One kind of thing: what there is of it, and by what a command takes it."""

    things: dict[str, Callable[[Path], Path | str | None]]
    """From a name to what makes it in an empty directory and says what to give."""
    taken_by: dict[str, str]
    """From a command to its argument or option."""


def by(parameter: str, *others: str) -> dict[str, str]:
    """Each command that has one of these parameters, with the last that it has."""
    found = {}
    for one in (parameter, *others):
        found |= dict.fromkeys(running.taking(one), one)
    return found


def data_of(kind: str) -> dict[str, str]:
    return {name: "--data" for name, what in running.DATA.items() if what == kind}


def given(make: Callable[[Path], None]) -> Callable[[Path], Path]:
    """What is made is the directory itself."""

    def made(directory: Path) -> Path:
        make(directory / "made")
        return directory / "made"

    return made


def masked(make: Callable[[Path], None]) -> Callable[[Path], Path]:
    """A good model, but for the mask that lies in its directory."""

    def made(directory: Path) -> Path:
        model = running.copied(small_model(), directory / "model")
        make(model)
        return model

    return made


@functools.cache
def small_model() -> Path:
    place = Path(tempfile.mkdtemp(prefix="melayer-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    small_runs.model().save_pretrained(place)
    toys.tokenizer().save_pretrained(place)
    return place


ROWS = {name: "--data" for name in running.DATA if name.startswith("tune")}
KINDS = {
    "checkpoint": Kind(checkpoints.CHECKPOINTS, by("model", "after")),
    "mask": Kind({name: masked(make) for name, make in masks.MASKS.items()}, by("model", "after")),
    "base": Kind({name: checkpoints.CHECKPOINTS[name] for name in list(checkpoints.CHECKPOINTS)[::8]}, by("--base")),
    "scales": Kind({name: given(make) for name, make in masks.SCALES.items()}, by("--calibration")),
    "text": Kind(corpora.TEXTS, by("--file") | data_of("texts")),
    "rows": Kind(corpora.ROWS, ROWS),
    "benchmarks": Kind(corpora.BENCHMARKS, data_of("benchmarks")),
    "store": Kind(stores.STORES, by("--out")),
}


def cases(all_of_them: bool) -> list[tuple[str, str, str]]:
    """(kind, thing, command): all, or of every fourth thing one command."""
    found = []
    for name, kind in KINDS.items():
        for thing in kind.things:
            # Other things and commands each time, and the same ones on every machine.
            drawn = int(hashlib.sha256(f"{name} {thing}".encode()).hexdigest(), 16)
            # What lies where a command keeps its own is for that command first.
            own = [command for command in kind.taken_by if name == "store" and command.split()[0] in thing]
            commands = sorted(set(own or kind.taken_by) - ({"demo"} if not all_of_them else set()))
            if all_of_them:
                # The demo is measured whole, and takes no model: a few places for its report will do.
                found += [
                    (name, thing, command)
                    for command in sorted(kind.taken_by)
                    if command != "demo" or ("report.html" in thing and drawn % 3 == 0)
                ]
            elif drawn % 4 == 0:
                found.append((name, thing, commands[drawn // 4 % len(commands)]))
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        chosen = cases(metafunc.config.getoption("--hostile") == "all")
        metafunc.parametrize("case", chosen, ids=["-".join(case).replace(" ", "-") for case in chosen])


def test_a_command_bears_it(setting, case, tmp_path):
    name, thing, command = case
    kind = KINDS[name]
    made, out, place = tmp_path / "thing", tmp_path / "out", tmp_path / "place"
    made.mkdir()
    place.mkdir()
    bad = {}
    if name == "store":
        out = made / "out"
        out.mkdir()
        kind.things[thing](out)
        watched = [path for path in made.iterdir() if path != out]
    else:
        bad = {kind.taken_by[command]: kind.things[thing](made)}
        watched = [made]
    as_json = len(thing) % 2 == 0
    line = setting.line(command, out, bad, as_json=as_json)
    ran = running.run(line, place, out, [*watched, *setting.good.values()])
    assert not checkpoints.ran(made), f"its code ran: {line}"
    running.require_polite(ran)


def test_every_command_is_taken_in():
    """What takes a model, texts or a place for its results is tried, whatever its name."""
    taken = {command for kind in KINDS.values() for command in kind.taken_by}
    assert taken == set(running.COMMANDS)
    for name in running.COMMANDS:
        if "--data" in running.options_of(name):
            assert name in running.DATA, f"say in running.DATA what --data of {name} is"


def test_each_kind_is_given_to_each_of_its_commands():
    for name, kind in KINDS.items():
        assert {command for which, _, command in cases(True) if which == name} == set(kind.taken_by)


def test_impolite_commands_are_found(tmp_path):
    """The check itself: each way to misbehave is seen."""
    ran = running.Ran(["locate", "x"], 2, "", "melayer: no.\n", [], [], [])
    running.require_polite(ran)
    for changes in (
        {"code": 1},
        {"code": -11},
        {"stdout": "x"},
        {"stderr": "melayer: no.\n" + "Traceback (most recent call last):\n"},
        {"stderr": "melayer: a\nb\nc\nd\n"},
        {"new": ["tmp/x"]},
        {"in_out": ["report.html"]},
        {"changed": ["x"]},
        {"code": 0, "line": ["locate", "--json"], "stdout": "{"},
        {"code": 0, "line": ["locate", "--json"], "stdout": '{"a": NaN}'},
    ):
        with pytest.raises((AssertionError, ValueError)):
            running.require_polite(running.Ran(**{**vars(ran), **changes}))
