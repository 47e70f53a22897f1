"""What is finished is read again; what is not ours, or of something else, is refused and left alone."""

import json
from dataclasses import dataclass

import pytest

from melayer.errors import InputError, OutputError
from melayer.runs.resume_log import Entries, ResumeLog


@dataclass(frozen=True)
class Step:
    n: int
    result: float = 0.5


ENTRIES = Entries("long-run", "step", lambda values: Step(**values), lambda step: step.n)


def opened(path, subject):
    return ResumeLog.opened(ENTRIES, path, subject)


def test_it_goes_on_with_what_was_kept(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    log = opened(path, {"of": (1, 2)})
    assert log.items == log.notes == {}
    for n in range(3):
        log.add(Step(n), [f"note {n}"])
    again = opened(path, {"of": [1, 2]})  # as JSON holds it
    assert again.items == log.items == {n: Step(n) for n in range(3)}
    assert again.notes == log.notes == {n: [f"note {n}"] for n in range(3)}
    assert list(again.notes_of([2, 0])) == ["note 2", "note 0"]
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head == {"long_run_of": {"of": [1, 2]}}
    assert lines[1] == {"step": {"n": 1, "result": 0.5}, "notes": ["note 1"]}


def test_without_a_file_it_is_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = opened(None, {"of": 1})
    log.add(Step(4), [])
    assert (log.items, log.notes) == ({4: Step(4)}, {4: []})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    log = opened(path, {})
    log.add(Step(1), [])
    whole = path.read_bytes()
    log.add(Step(2), [])
    path.write_bytes(path.read_bytes()[:-cut])
    assert opened(path, {}).items == {1: Step(1)}
    assert path.read_bytes() == whole


def test_a_file_in_which_nothing_is_finished_is_begun_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    opened(path, {"of": 1})
    log = opened(path, {"of": 2})
    assert log.items == {}
    log.add(Step(1), [])
    assert opened(path, {"of": 2}).items == {1: Step(1)}


def test_another_subject_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    opened(path, {"a": 1, "b": 2}).add(Step(1), [])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"is of another long-run: b, c differ. Give another place, or remove it"):
        opened(path, {"a": 1, "c": 2})
    with pytest.raises(InputError, match=r"is of another long-run: a differs"):
        opened(path, {"a": 2, "b": 2})
    assert path.read_bytes() == before


STEP = '{"step": {"n": 1}, "notes": []}\n'


@pytest.mark.parametrize(
    "content",
    [
        "two\nlines\n",
        '{"a": 1}\n' + STEP,
        '{"long_run_of": {}}\n{"step": {"m": 1}, "notes": []}\n',
        '{"long_run_of": {}}\n{"step": {"n": 1}}\n',
        '{"long_run_of": {}}\n{"stage": {"n": 1}, "notes": []}\n',
        "1\n2\n",
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path, content):
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"holds no long-run that can be read"):
        opened(path, {})
    assert path.read_text() == content
    path.write_text('{"long_run_of": {}}\n' + STEP)
    assert opened(path, {}).items == {1: Step(1)}  # what the others lack


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"The long-run cannot be kept in .*Give another place"):
        opened(tmp_path / "file" / "run.jsonl", {})
    log = opened(tmp_path / "run.jsonl", {})
    log.path = tmp_path / "file" / "run.jsonl"
    with pytest.raises(OutputError, match=r"The long-run cannot be kept in .*Give another place"):
        log.add(Step(1), [])
