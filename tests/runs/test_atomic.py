"""A directory that appears whole or not at all, on the disk before anybody hears of it."""

import os
from pathlib import Path

import pytest

from melayer.runs import atomic


def test_a_staged_directory_becomes_the_one_that_was_meant(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with atomic.staged_directory(tmp_path / "new") as place:
        (place / "inner").mkdir()
        (place / "inner" / "file").write_text("text")
        assert not (tmp_path / "new").exists()
        assert place.name.startswith("new.")
        assert place.name.endswith(".tmp")
    assert (tmp_path / "new" / "inner" / "file").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    # Every file and every directory, the one around it at the end, when the new name is in it.
    assert set(synced[:-1]) == {f"{place}", f"{place}/inner", f"{place}/inner/file"}
    assert synced[-1] == str(tmp_path)


def test_nothing_is_left_after_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.staged_directory(tmp_path / "new") as place:
        (place / "file").write_text("text")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"), atomic.staged_directory(tmp_path / "file" / "new"):
        pytest.fail("entered")
