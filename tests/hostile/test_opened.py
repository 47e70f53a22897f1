"""What a command opens on a hostile model, seen from outside by strace: nothing that it was not given."""

import shutil
import sys

import pytest

from hostile import checkpoints
from test_versions import script

STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
TEXT = "w1 w2 w3 X w4 w5 w6 w7 w8 w9"


@pytest.fixture(scope="module")
def opened_files():
    return script("opened_files")


def strange(opened_files, model, models, place):
    """What a command opens or connects to that is neither one of the models, nor its own cache, nor Python."""
    place.mkdir()
    command = [sys.executable, "-m", "melayer", "locate", str(model), "--text", TEXT, "--json"]
    done, lines = opened_files.traced(command, place)
    allowed = [
        *(str(one.resolve()) for one in models),
        str(place.resolve()),
        *opened_files.python(),
        *opened_files.SYSTEM,
    ]
    return done, list(opened_files.strange(lines, allowed))


@STRACE
@pytest.mark.parametrize(
    "name", ["index-leads-up", "index-absolute", "weights-are-a-link", "adapter-tokenizer-auto-map"]
)
def test_a_hostile_model_opens_nothing_outside(opened_files, name, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    model = checkpoints.CHECKPOINTS[name](made)
    models = [directory for directory in made.iterdir() if directory.name != "outside"]
    done, found = strange(opened_files, model, models, tmp_path / "place")
    assert done.returncode in (0, 2), done.stderr
    assert not found


@STRACE
def test_a_model_that_is_all_right_opens_nothing_outside(opened_files, tmp_path):
    model = checkpoints.healthy(tmp_path / "model")
    done, found = strange(opened_files, model, [model], tmp_path / "place")
    assert done.returncode == 0, done.stderr
    assert not found


@STRACE
def test_a_file_outside_is_seen(opened_files, tmp_path):
    """The check itself: a text that was given, but is not among what is allowed."""
    (tmp_path / "text").write_text("x")
    place = tmp_path / "place"
    place.mkdir()
    code = f"import socket; open({str(tmp_path / 'text')!r}); socket.socket().connect_ex(('127.0.0.1', 9))"
    _, lines = opened_files.traced([sys.executable, "-c", code], place)
    found = list(opened_files.strange(lines, [str(place.resolve()), *opened_files.python(), *opened_files.SYSTEM]))
    assert found[0] == f"open {tmp_path / 'text'}"
    assert "sin_port=htons(9)" in found[1]
