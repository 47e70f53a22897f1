"""The command line in this process, as a test runs it."""

import inspect

from typer.testing import CliRunner

import toys
from melayer import cli

TEXT = toys.text(20, x_at=4)


def run(*arguments, **environment):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", **environment})


def failing(*arguments):
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("melayer: ")
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def defaults(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}
