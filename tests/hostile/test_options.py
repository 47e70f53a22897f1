"""Every option of every command with values that nobody can mean: a sentence, or an answer."""

import json
import os
import resource
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import children
from hostile import running
from melayer import cli

VALUES = {
    "empty": "",
    "blank": " ",
    "nan": "nan",
    "infinity": "inf",
    "negative": "-1",
    "zero": "0",
    "beyond-64-bit": str(2**64),
    "beyond-float": "1e999",
    "digits": "9" * 5000,
    "not-utf-8": os.fsdecode(b"\xff\xfe"),
    "long-name": "x" * 300,
    "nobody's-home": "~nosuchuser/x",
    "a-device": "/dev/null",
    "a-directory": "/",
    "braces": "{{ 1/0 }}",
    "percent": "%s%n",
    "comma": ",",
    "brackets": "[" * 2000,
    "control": "\x1b[2J\x07",
}
SHARED = "locate"
"""Options that several commands share are tried on this one alone, unless all are."""


def tried(name):
    """The options of a command that take a value; those that all share only once."""
    shared = set(running.options_of(SHARED)) if name != SHARED else set()
    takes = [max(one.opts, key=len) for one in running.COMMANDS[name] if not getattr(one, "is_flag", False)]
    return [option for option in takes if option.startswith("-") and option not in shared]


def lines(setting, name, place, everything):
    """[option, value's name, command line]: all values of each option, or of each another few."""
    found = []
    for at, option in enumerate(tried(name)):
        for which, (about, value) in enumerate(VALUES.items()):
            if everything or (which + at) % 6 == 0:
                out = place / f"out-{at}-{which}"
                line = setting.line(name, out, {option: value} if option != "--out" else {})
                if option in line:
                    line[line.index(option) + 1] = value if option != "--out" else str(out / value)
                else:
                    line += [option, value]
                found.append((option, about, line))
    return found


def runs(found, answer, work):
    """Runs the lines one after another in this process, and writes what came of each."""
    resource.setrlimit(resource.RLIMIT_DATA, (running.MEMORY, running.MEMORY))
    os.chdir(work)
    done = []
    for _, _, line in found:
        sys.argv = ["melayer", *line]
        result = CliRunner().invoke(cli.app, line, env={"COLUMNS": "200"})
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        done.append((result.exit_code, result.stdout, result.stderr, repr(result.exception) if unexpected else ""))
        Path(answer).write_text(json.dumps(done))


@pytest.mark.parametrize("name", [name for name in running.COMMANDS if name != "demo"])
def test_no_value_of_an_option_ends_in_a_trace(setting, name, tmp_path, everything):
    found = lines(setting, name, tmp_path, everything)
    work, answer = tmp_path / "work", tmp_path / "answer.json"
    work.mkdir()
    before = {path: running.snapshot(path) for path in setting.good.values()}
    code = children.ended(children.started(runs, found, str(answer), str(work)))
    done = json.loads(answer.read_text()) if answer.exists() else []
    assert code == 0, f"{code} at {found[len(done)]}"
    wrong = []
    for (option, about, line), (exit_code, stdout, stderr, exception) in zip(found, done, strict=True):
        said = [text for text in stderr.splitlines() if text.strip()]
        if exit_code not in (0, 2) or exception or len(said) > running.LINES or (exit_code == 2 and stdout):
            wrong.append((option, about, exit_code, exception[:200], stderr[-400:]))
        elif exit_code == 0 and "--json" in line:
            json.loads(stdout, parse_constant=pytest.fail)
    assert not wrong, "\n".join(map(str, wrong))
    assert {path: running.snapshot(path) for path in setting.good.values()} == before


def test_the_values_reach_the_commands(setting, tmp_path):
    """Were they lost on the way, all would be well."""
    lines_of = {option for option, _, _ in lines(setting, "scan", tmp_path, True)}
    assert {"--sites", "--layers", "--category", "--out"} <= lines_of
    assert "--dtype" not in lines_of
    assert {"--dtype", "--device", "--min-abs"} <= {option for option, _, _ in lines(setting, "locate", tmp_path, True)}
