"""What killed processes leave goes with the next write; what living ones are writing, and what is not ours, stays."""

import os
import signal
import subprocess
import sys
import time

import pytest

import children
from melayer.runs import atomic, leftovers


def left(directory, name, age=0.0):
    """Something unfinished of this name, whose last change was some time ago."""
    path = directory / name
    path.mkdir()
    (path / "file").write_text("half")
    for place in (path / "file", path):
        os.utime(place, (time.time() - age,) * 2)
    return path


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def gone():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def here(number, name=""):
    mine = leftovers.prefix(name)
    return mine.replace(f"-{os.getpid()}-", f"-{number}-") + "abcd_123"


def elsewhere(number):
    return f".melayer-00000000-{number}-abcd_123"


def test_what_a_process_that_is_gone_has_left_goes(tmp_path, gone):
    left(tmp_path, here(gone))
    left(tmp_path, here(gone, "entry") + ".tmp")
    leftovers.remove(tmp_path)
    assert names(tmp_path) == []


def test_what_a_living_process_is_writing_stays(tmp_path):
    for number in (os.getpid(), os.getppid(), 1):
        left(tmp_path, here(number), age=10 * leftovers.PATIENCE)
    before = names(tmp_path)
    leftovers.remove(tmp_path)
    assert names(tmp_path) == before


def test_what_another_machine_has_left_goes_when_nothing_has_changed_for_a_day(tmp_path, gone):
    left(tmp_path, elsewhere(gone), age=leftovers.PATIENCE - 3600)
    old = left(tmp_path, elsewhere(os.getpid()), age=leftovers.PATIENCE + 3600)
    changed = left(tmp_path, elsewhere(7), age=leftovers.PATIENCE + 3600)
    (changed / "file").write_text("it is still being written")
    leftovers.remove(tmp_path)
    assert not old.exists()
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    "name", [".melayer-abcdefgh", ".melayer-backup", "melayer-0-1-x", ".melayer-00000000-1-abcd_123.d", "x.tmp"]
)
def test_what_is_not_ours_stays(tmp_path, name):
    left(tmp_path, name, age=10 * leftovers.PATIENCE)
    leftovers.remove(tmp_path)
    assert names(tmp_path) == [name]


def test_links_and_files_of_such_names_stay(tmp_path, gone):
    target = left(tmp_path, "somebody's")
    (tmp_path / here(gone)).symlink_to(target)
    (tmp_path / f"{here(gone)}.tmp").write_text("a file")
    before = names(tmp_path)
    leftovers.remove(tmp_path)
    assert names(tmp_path) == before
    assert names(target) == ["file"]


def test_where_nothing_can_be_listed_nothing_is_said(tmp_path):
    leftovers.remove(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    leftovers.remove(tmp_path / "file")


def killed_over(directory):
    """Dies while a file is staged, and while a directory is."""
    with atomic.staged(directory) as place:
        (place / "file").write_text("half")
        with atomic.staged_directory(directory / "entry") as inner:
            (inner / "file").write_text("half")
            children.kill()


@pytest.mark.parametrize(
    "write",
    [
        lambda directory: atomic.write_text(directory / "new", "text"),
        atomic.require_writable,
        lambda directory: atomic.staged_directory(directory / "other").__enter__(),
    ],
)
def test_the_next_write_removes_what_a_kill_left(tmp_path, write):
    assert children.ended(children.started(killed_over, tmp_path)) == -signal.SIGKILL
    two = names(tmp_path)
    assert len(two) == 2
    write(tmp_path)
    assert not set(two) & set(names(tmp_path))
