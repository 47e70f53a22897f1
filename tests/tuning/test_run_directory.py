"""Whether a run may begin or go on in a directory, decided before anything in it is touched."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from damaged import damaged
from hostile import stores
from melayer.errors import InputError, MelayerError, MelayerWarning, OutputError
from melayer.runs import jsonl
from melayer.tuning import checkpoints, run_directory

SETTINGS = {"method": "sft", "processes": 1, "config": {"learning_rate": 0.5}}


def opened(out, *, resume=False, settings=SETTINGS):
    return run_directory.opened(out, settings, resume=resume)


def begun(out, *steps):
    """A run that has logged these steps and kept the last one."""
    opened(out)
    run_directory.begin(out, SETTINGS, None, resume=False)
    for step in steps:
        run_directory.add_to_log(out, {"step": step, "loss": 1 / step})
    if steps:
        name = f"checkpoint-{steps[-1]}"
        staged = checkpoints.clear(out) / name
        staged.mkdir()
        for file in ("model.safetensors", "scheduler.pt", "optimizer.pt"):
            (staged / file).write_bytes(b"weights of " + file.encode())
        checkpoints.publish(staged, out / name)
        (out / checkpoints.STAGING).rmdir()
    return out


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in stores.STORES if any(at in name for at in ("tune.json", ".unfinished", "log."))]
)
def test_what_others_put_there_stays(tmp_path, name, resume):
    stores.STORES[name](tmp_path)
    before = stores.found(tmp_path)
    with pytest.raises(MelayerError):
        opened(tmp_path, resume=resume)
    assert stores.found(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["config.json", "my notes.json", "checkpoint-3", "model.safetensors", "report.html", "tokenizer.model"]
)
def test_a_new_run_begins_where_nothing_is_that_it_may_write(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{tmp_path} holds (a model|{name} already)"):
        opened(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert opened(tmp_path) is None


def test_a_run_that_failed_before_its_first_step_may_begin_anew(tmp_path):
    begun(tmp_path)
    other = {**SETTINGS, "config": {"learning_rate": 0.1}}
    assert opened(tmp_path, settings=other) is None
    run_directory.begin(tmp_path, other, None, resume=False)
    assert json.loads((tmp_path / run_directory.FILE).read_text())["settings"] == other
    run_directory.add_to_log(tmp_path, {"step": 1, "loss": 0.5})
    with pytest.raises(InputError, match="holds a run already, that was stopped; go on with --resume"):
        opened(tmp_path)


def test_it_goes_on_from_a_whole_checkpoint(tmp_path):
    found = opened(begun(tmp_path, 1, 2), resume=True)
    assert (found.step, found.path.name) == (2, "checkpoint-2")
    run_directory.begin(tmp_path, SETTINGS, found, resume=True)
    assert run_directory.read_log(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_a_checkpoint_that_was_changed_is_refused(tmp_path):
    begun(tmp_path, 2)
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    content = weights.read_bytes()
    for other in (content[:-1], content[:-1] + b"?", b""):
        weights.write_bytes(other)
        with pytest.raises(InputError, match=r"model.safetensors is not as it was written .*\. Remove that directory"):
            opened(tmp_path, resume=True)
    weights.unlink()
    with pytest.raises(InputError, match="model.safetensors is not as it was written"):
        opened(tmp_path, resume=True)
    weights.write_bytes(content)
    assert opened(tmp_path, resume=True).step == 2
    (tmp_path / "checkpoint-2" / checkpoints.CHECKSUMS).unlink()
    with pytest.warns(MelayerWarning, match="checkpoint-2 has no checksums"):
        assert opened(tmp_path, resume=True).step == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = begun(tmp_path_factory.mktemp("run"), 1, 2, 3)
    names = (run_directory.FILE, run_directory.LOG, f"checkpoint-3/{checkpoints.CHECKSUMS}")
    return out, {name: (out / name).read_bytes() for name in names}, run_directory.read_log(out)


@given(st.data())
def test_whatever_byte_is_changed_or_cut_no_figure_becomes_another(run, data):
    out, contents, log = run
    name = data.draw(st.sampled_from(sorted(contents)))
    damage = damaged(contents[name], data)
    (out / name).write_bytes(damage)
    try:
        found = opened(out, resume=True)
        assert found.step == 3
        assert all(line in log for line in run_directory.read_log(out))
    except MelayerError:
        assert (out / name).read_bytes() == damage
    finally:
        (out / name).write_bytes(contents[name])


@pytest.mark.parametrize("line", [{"step": 1, "loss": "0.5"}, {"loss": 0.5}, {"step": 0.5}, {"step": 1, "x": [1]}])
def test_a_log_that_is_none(tmp_path, line):
    begun(tmp_path, 1)
    jsonl.replace(tmp_path / run_directory.LOG, [line], own=True)
    with pytest.raises(InputError, match=r"log.jsonl is no log of a run: line 1"):
        opened(tmp_path, resume=True)


def test_a_place_whose_name_is_not_utf_8_is_refused_before(tmp_path):
    with pytest.raises(OutputError, match=r"Nothing can be written to .*: '\\udce9' is no character"):
        opened(tmp_path / "caf\udce9")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_name_that_no_run_was_expected_to_write(tmp_path):
    written = begun(tmp_path / "out", 1) / checkpoints.STAGING
    written.mkdir()
    for name in ("config.json", "weights.xyz"):
        (written / name).write_text("new")
    (tmp_path / "out" / "weights.xyz").write_text("somebody's")
    with pytest.raises(OutputError, match="weights.xyz was not written by melayer"):
        checkpoints.publish_files(written, tmp_path / "out", "config.json")
    assert (tmp_path / "out" / "weights.xyz").read_text() == "somebody's"
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "weights.xyz"]
