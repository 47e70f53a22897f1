"""Whatever ends a command: one sentence on stderr, a code that says what kind of end it is, and never a trace."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import typer

from command import TEXT, failing, run
from melayer import cli
from melayer.cli import measuring, options
from melayer.errors import InputError
from melayer.runs import jsonl


def commands(of=None, path=()):
    """Every command of the tree with its words."""
    of = of or typer.main.get_command(cli.app)
    for name, command in getattr(of, "commands", {}).items():
        yield from commands(command, (*path, name)) if hasattr(command, "commands") else [((*path, name), command)]


TREE = dict(commands())


def required(command):
    """Its arguments and required options, with values that are text."""
    words = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            words.append("x")
        elif parameter.required:
            words += [parameter.opts[0], "x"]
    return words


class PanicException(BaseException):
    """What a panic in Rust arrives as."""


FAULTS = {
    "an error": (ZeroDivisionError("division by zero"), 70, "unexpected ZeroDivisionError: division by zero."),
    "a deep one": (RecursionError("maximum recursion depth"), 70, "unexpected RecursionError: it is nested too deeply"),
    "memory": (MemoryError(), 70, "unexpected MemoryError: it does not fit into memory"),
    "a panic": (PanicException("index out of bounds"), 70, "unexpected PanicException: index out of bounds"),
    "an exit of others": (SystemExit(5), 70, "unexpected SystemExit: 5"),
    "lines": (ValueError("one\ntwo\nthree\nfour\n\x1b[2Jfive"), 70, "unexpected ValueError: one."),
    "surrogates": (ValueError("caf\udce9"), 70, "unexpected ValueError: caf\\udce9."),
    "ours": (InputError("Not so.\nBut so."), 2, "melayer: Not so. But so."),
    "ours with escapes": (InputError("\x1b[2J is no name."), 2, "melayer: \\x1b[2J is no name."),
    "Ctrl-C": (KeyboardInterrupt(), 130, "melayer: Stopped. Nothing was kept."),
}


@pytest.mark.parametrize("words", TREE, ids=" ".join)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_ends_in_a_sentence(words, fault, monkeypatch, tmp_path):
    """In whatever it does first, which is to look at its numbers."""
    error, code, said = FAULTS[fault]
    monkeypatch.chdir(tmp_path)

    def fails(values):
        raise error

    monkeypatch.setattr(options, "check_numbers", fails)
    done = run(*words, *required(TREE[words]))
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.isascii()
    if code == 70:
        assert "run the command again with --debug, and please report" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_with_debug_there_is_a_trace(monkeypatch):
    monkeypatch.setattr(options, "check_numbers", lambda values: 1 / 0)
    done = run("locate", "x", "--debug")
    assert done.exit_code == 70
    assert done.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nonsense"], "No such option: --nonsense. See melayer --help."),
        (["locate", "x", "--nonsense"], "No such option: --nonsense"),
        (["lcate", "x"], "No such command 'lcate'. Did you mean 'locate'? See melayer --help."),
        (["sweep"], "Missing argument 'model'"),
        (["tune", "sft", "x"], "Missing option '--data'"),
        (["tune", "xyz"], "No such command 'xyz'"),
        (["locate", "x", "y"], "Got unexpected extra argument"),
        (["locate", "x", "--limit", "0"], "Invalid value for '--limit'"),
        (["locate", "x", "--limit", "1.5"], "Invalid value for '--limit'"),
        (["locate", "x", "--limit", "9" * 5000], "Invalid value for '--limit'"),
        (["locate", "x", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["locate", "x", "--limit", "9" * 40], "--limit is a number of more than 30 digits; expected at most"),
        (["locate", "x", "--limit", str(2**31)], f"--limit is {2**31}; expected at most {2**31 - 1}"),
        (["rigidity", "x", "--seed", str(2**64)], f"--seed is {2**64}; expected at most {2**32 - 1}"),
        (["sinks", "x", "-T", str(-(2**63))], f"--T is {-(2**63)}; expected at most"),
        (["locate", "x", "--min-abs", "nan"], "--min-abs is nan; expected a finite number"),
        (["locate", "x", "--min-abs", "inf"], "--min-abs is inf; expected a finite number"),
        (["sinks", "x", "--epsilon=-inf"], "--epsilon is -inf; expected a finite number"),
        (["locate", "x", "--min-ratio", "1e400"], "--min-ratio is inf; expected a finite number"),
        (["locate", "x", "--min-abs", "-1e300"], "--min-abs is -1e+300; expected a finite number, and at most 3.4e+38"),
        (["locate", ""], "MODEL was given without a value ('')"),
        (["report", "x", "--out", ""], "--out was given without a value ('')"),
        (["report", "x", "--out="], "--out was given without a value ('')"),
        (["compare", "", "x"], "FIRST was given without a value ('')"),
        (["locate", "x", "--text", ""], "Text 0 is empty"),
    ],
)
def test_options_that_are_none(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("melayer: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 1000
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_some(toy_directory):
    done = run("locate", toy_directory, "--text", TEXT, "--max-batch-tokens", 2**31 - 1, "--min-abs", "1e38", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["me_layer"] is None


def test_without_a_command_the_help_is_shown():
    done = run()
    assert done.exit_code == 2
    assert "locate" in done.stdout
    assert done.stderr == "melayer: No command was given. Choose one of those above.\n"
    assert run("--help").exit_code == run("--version").exit_code == run("sweep", "--help").exit_code == 0


WARNING = """
import logging, sys, warnings
from melayer.__main__ import main
from melayer.cli import options
from melayer.errors import MelayerWarning

def warns(values):
    warnings.warn("it will go", FutureWarning)
    warnings.warn("it has gone", DeprecationWarning)
    logging.getLogger("somebody.else").warning("a log line")
    warnings.warn("Look:\\nthis is ours", MelayerWarning)
    1 / 0

options.check_numbers = warns
main()
"""


@pytest.mark.parametrize("debug", [False, True])
def test_what_others_warn_of_is_told_to_who_looks_for_a_fault(python, debug):
    words = ["locate", "x", *(["--debug"] if debug else [])]
    done = subprocess.run(
        [python[0], "-c", WARNING, *words], env=python[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 70
    assert done.stderr.splitlines()[-1].startswith("melayer: unexpected ZeroDivisionError")
    assert "Note: Look: this is ours" in done.stderr
    for said in ("it will go", "it has gone", "a log line", "Traceback"):
        assert (said in done.stderr) == debug
    assert debug or len(done.stderr.splitlines()) == 2


def test_ctrl_c_says_what_stands(monkeypatch, toy_directory, tmp_path):
    append, replace = jsonl.append, jsonl.replace

    def stops(function):
        def stopping(path, values, **options):
            function(path, values, **options)
            signal.raise_signal(signal.SIGINT)

        return stopping

    monkeypatch.setattr(jsonl, "replace", stops(replace))
    monkeypatch.setattr(jsonl, "append", stops(append))
    asked = ("sweep", toy_directory, "--text", TEXT, "-T", 16, "--rates", "0,1", "--selectors", "random")
    done = run(*asked, "--out", tmp_path)
    assert done.exit_code == 130
    said = f"melayer: Stopped. What was kept in {tmp_path} stands, and the same command goes on from there.\n"
    assert done.stderr == said
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.jsonl"]
    monkeypatch.undo()
    assert run(*asked, "--out", tmp_path).exit_code == 0


# --- a process as somebody starts it -------------------------------------------------------------------------------


def typed(python, *words, stdout=subprocess.PIPE, shell="", **environment):
    command = [python[0], "-m", "melayer", *map(str, words)]
    if shell:
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
    done = subprocess.run(
        command, env={**python[1], **environment}, stdout=stdout, stderr=subprocess.PIPE, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-16", "utf-8:strict"])
def test_every_encoding_can_take_a_result(python, toy_directory, encoding):
    for words in ((), ("--json",)):
        code, out, said = typed(
            python, "locate", toy_directory, "--text", f"{TEXT} “é” 😀", *words, PYTHONIOENCODING=encoding
        )
        assert (code, said) == (0, "")
        text = out.decode(encoding.partition(":")[0])
        if words:
            assert json.loads(text, parse_constant=pytest.fail)["me_layer"] == 3
        else:
            assert "The ME layer is block 3 of 8" in text


def test_the_plainest_locale(python, toy_directory):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, out, said = typed(python, "locate", toy_directory, "--text", TEXT, **plain)
    assert (code, said) == (0, "")
    assert out.isascii()


@pytest.mark.parametrize("words", [(), ("--json",)])
@pytest.mark.parametrize(
    ("shell", "said"),
    [
        (">/dev/full", "No space left on device"),
        ("| true", "whoever read it has closed it"),
        (">&-", "stdout is closed"),
    ],
)
def test_a_stdout_that_takes_nothing(python, toy_directory, shell, said, words):
    code, _, told = typed(python, "locate", toy_directory, "--text", TEXT, *words, shell=shell)
    assert code == 2
    assert told.startswith("melayer: ")
    assert said in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("sweep", "--help")])
def test_nor_the_help(python, words):
    code, _, told = typed(python, *words, shell=">/dev/full")
    assert (code, told.count("\n")) == (2, 1)
    assert "No space left on device" in told


@pytest.mark.parametrize("shell", ["<&-", "2>&-", "<&- 2>&-"])
def test_streams_that_nobody_needs_may_be_closed(python, toy_directory, shell):
    code, out, _ = typed(python, "locate", toy_directory, "--text", TEXT, "--json", shell=shell)
    assert code == 0
    assert json.loads(out)["me_layer"] == 3


def test_a_place_whose_name_is_not_utf_8(python, toy_directory, tmp_path):
    out = os.fsencode(tmp_path) + b"/caf\xe9"
    code, told, said = typed(python, "report", toy_directory, "--text", TEXT, "--out", os.fsdecode(out))
    assert code == 0, said
    assert "caf\\udce9" in told.decode()
    values = json.loads(Path(os.fsdecode(out), "report.json").read_bytes().decode("utf-8"))
    assert values["provenance"]["command"].endswith("caf\\udce9'")
    assert sorted(path.name for path in Path(os.fsdecode(out)).iterdir()) == ["report.html", "report.json"]


def test_stopped_as_a_person_stops_it(python, tmp_path):
    """By Ctrl-C while the model is waited for."""
    process = subprocess.Popen(
        [python[0], "-c", "import signal, melayer.__main__ as m\n"
         "from melayer.cli import session\n"
         "session.load = None\n"
         "from melayer.interventions import load\n"
         "load.load = lambda *a, **o: signal.raise_signal(signal.SIGINT)\n"
         "import sys; sys.argv = ['melayer', 'locate', 'x']\n"
         "from melayer.cli import measuring, session as s\n"
         "measuring.load = lambda *a: signal.raise_signal(signal.SIGINT)\n"
         "m.main()"],
        env=python[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, said = process.communicate(timeout=300)
    assert (process.returncode, out, said) == (130, b"", b"melayer: Stopped. Nothing was kept.\n")


def test_an_installation_that_lacks_something(python):
    done = subprocess.run(
        [python[0], "-c", "import sys; sys.modules['typer'] = None\nfrom melayer.__main__ import main; main()"],
        env=python[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 70
    assert done.stderr.startswith("melayer: cannot be loaded (ModuleNotFoundError")
    assert len(done.stderr.splitlines()) == 1


# --- pages that are there ------------------------------------------------------------------------------------------


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_page_of_another_run_is_not_lost(toy_directory, tmp_path):
    asked = ("--text", TEXT, "--out", tmp_path)
    assert run("report", toy_directory, *asked).exit_code == 0
    before = content(tmp_path)
    assert f"made by `melayer report {toy_directory}" in failing("contrast", toy_directory, toy_directory, *asked)
    assert "holds a report already" in failing("report", "demo", *asked)
    assert "holds a report already" in failing("sweep", toy_directory, *asked)
    assert content(tmp_path) == before
    # The same command writes it again, with whatever options.
    done = run("report", "--max-listed", 3, toy_directory, *asked)
    assert done.exit_code == 0, done.stderr
    assert content(tmp_path) != before
    # Made from Python, nobody knows of what.
    values = json.loads((tmp_path / "report.json").read_text())
    values["provenance"]["command"] = None
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert "made by Python" in failing("report", toy_directory, *asked)


@pytest.mark.parametrize("words", [("--json",), ()])
def test_what_was_measured_is_shown_where_it_cannot_be_written(toy_directory, tmp_path, monkeypatch, words):
    """As when somebody puts a file there meanwhile."""
    measured = measuring.everything

    def meanwhile(*given):
        found = measured(*given)
        (tmp_path / "report.html").write_text("somebody's")
        return found

    monkeypatch.setattr(measuring, "everything", meanwhile)
    done = run("report", toy_directory, "--text", TEXT, "--out", tmp_path, *words)
    assert done.exit_code == 2
    assert "report.html was not written by melayer" in done.stderr
    if words:
        assert json.loads(done.stdout)["locate"]["me_layer"] == 3
    else:
        assert "The ME layer is block 3 of 8" in " ".join(done.stdout.split())
    assert content(tmp_path) == {"report.html": b"somebody's"}


@pytest.mark.parametrize("spoil", ["gone", "read-only"])
def test_a_place_that_goes_while_it_is_worked_for(toy_directory, tmp_path, monkeypatch, spoil):
    out, corpus = tmp_path / "out", tmp_path / "corpus.txt"
    corpus.write_text("\n".join([TEXT] * 3))

    from melayer.census import worker

    observe, seen = worker.observe, []

    def spoiling(*given):
        if not seen:
            out.rmdir()
            if spoil == "read-only":
                out.write_text("somebody's")
        seen.append(1)
        return observe(*given)

    monkeypatch.setattr(worker, "observe", spoiling)
    done = run("scan", toy_directory, "--data", corpus, "--out", out, "--sites", "block_out")
    if spoil == "gone":
        assert done.exit_code == 0, done.stderr
        assert sorted(content(out)) == ["report.html", "report.json", "scan.0.state"]
    else:
        assert done.exit_code == 2
        assert "The scan cannot be kept in" in done.stderr
        assert out.read_text() == "somebody's"
    assert len(done.stderr.splitlines()) <= 1
    with contextlib.suppress(FileNotFoundError):
        assert not list(tmp_path.glob(".melayer-*"))
