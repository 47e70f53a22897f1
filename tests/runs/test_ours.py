"""What melayer wrote is told from what others did, by what the file says of itself and by what kind of thing it is."""

import pytest
import torch
from safetensors.torch import save_file

from hostile import stores
from melayer.errors import OutputError
from melayer.runs import atomic, ours

OURS = {
    "report.json": '{\n "melayer_version": "0.1.0",\n "provenance": {}}',
    "melayer_tune.json": '{"status": "finished", "melayer_version": "0.1.0"}',
    "scales.json": '{\n "version": 1,\n "melayer_version": "0.1.0"}',
    "melayer_mask.json": '{\n "version": 1,\n "rate": 0.5}',
    "sweep.jsonl": '{"sweep_of": {"strength": 1.0}, "crc32": "00000000"}\n',
    "eval.jsonl": '{"eval_of": {}}\n',
    "report.html": '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="generator" content="melayer 0.1.0">',
    "older.html": '<!doctype html>\n<html lang="en">\n<head>\n<title>Massive activations of demo</title>',
    "README.md": "---\ntags: [melayer]\n---\n<!-- Written by melayer, which writes it again. -->",
}
OTHERS = {
    "report.json": '{"provenance": {}, "melayer_version": "0.1.0"}',
    "note.json": '{"version": 1, "name": "x"}',
    "other.jsonl": '{"part_of": 3}\n',
    "report.html": "<!doctype html><title>Massive activations</title>",
    "README.md": "# Written by melayer",
    "list.json": '["melayer_version", "0.1.0"]',
}


@pytest.mark.parametrize("name", OURS)
def test_ours(tmp_path, name):
    path = tmp_path / name
    path.write_text(OURS[name])
    ours.require([path])
    atomic.write_text(path, "new")
    assert path.read_text() == "new"


def test_tensors(tmp_path):
    path = tmp_path / "scales.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata={"melayer_version": "0.1.0"})
    ours.require([path])
    path.write_text('{"melayer_version": "0.1.0"}')
    with pytest.raises(OutputError, match="was not written by melayer"):
        ours.require([path])
    save_file({"x": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="was not written by melayer"):
        ours.require([path])
    # As the first version left them.
    path.with_suffix(".json").write_text(OURS["scales.json"])
    ours.require([path])


@pytest.mark.parametrize("name", OTHERS)
def test_others(tmp_path, name):
    path = tmp_path / name
    path.write_text(OTHERS[name])
    with pytest.raises(OutputError, match=f"{name} was not written by melayer, so it is left as it is"):
        atomic.write_text(path, "new")
    assert path.read_text() == OTHERS[name]
    # The same bytes are nobody's loss, and of a directory of ours all is ours.
    atomic.write_text(path, OTHERS[name])
    atomic.write_text(path, "new", own=True)
    assert path.read_text() == "new"


@pytest.mark.parametrize("kind", stores.KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_whatever_is_there_stays(tmp_path, kind, own):
    path = tmp_path / "file"
    stores.KINDS[kind](path)
    before = stores.found(tmp_path)
    plain = ours.is_file(path)
    if own and plain:
        return
    with pytest.raises(OutputError, match="file (is|was not)"):
        atomic.write_text(path, "new", own=own)
    assert stores.found(tmp_path) == before


def test_nothing_is_ours_to_write(tmp_path):
    ours.require([tmp_path / "new", tmp_path / "new" / "file"])
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="would be below something that is no directory"):
            ours.require([tmp_path / name / "new"])


@pytest.mark.parametrize("kind", ["a directory", "a pipe"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    stores.KINDS[kind](tmp_path / "x")
    with pytest.raises(OSError, match="and no file"):
        ours.read_bytes(tmp_path / "x")
