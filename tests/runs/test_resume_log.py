"""What is finished is read again; what is not ours, or of something else, is refused and left alone."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from damaged import damaged
from melayer.errors import InputError, MelayerError, OutputError
from melayer.runs import jsonl
from melayer.runs.resume_log import Entries, ResumeLog


@dataclass(frozen=True)
class Step:
    n: int
    result: float = 0.5


ENTRIES = Entries("long-run", "step", Step, lambda step: step.n)


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
    head, *lines = jsonl.read(path, "", "").values
    assert head == {"long_run_of": {"of": [1, 2]}}
    assert lines[1] == {"step": {"n": 1, "result": 0.5}, "notes": ["note 1"]}
    assert [list(json.loads(line))[-1] for line in path.read_text().splitlines()] == ["crc32"] * 4


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
    log = opened(path, {})
    assert log.items == {1: Step(1)}
    log.add(Step(2), [])
    assert path.read_bytes() != whole
    assert opened(path, {}).items == {1: Step(1), 2: Step(2)}


def test_a_file_in_which_nothing_is_finished_is_begun_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    assert opened(path, {"of": 1}).items == {}
    assert not path.exists()
    path.write_text('{"long_run_of": {"of": 1}}\n')
    log = opened(path, {"of": 2})
    assert log.items == {}
    assert path.read_text() == '{"long_run_of": {"of": 1}}\n'
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


HEAD = '{"long_run_of": {}}\n'
STEP = '{"step": {"n": 1, "result": 0.5}, "notes": []}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("two\nlines\n", "was not written by melayer, so it is left as it is"),
        ("one line", "was not written by melayer"),
        ("one line\n", "was not written by melayer"),
        ('{"milk": 1}\n{"eggs": 2}\n{"bread": 3', "was not written by melayer"),
        ("", "was not written by melayer"),
        ("\0" * 100, "was not written by melayer"),
        ('{"a": 1}\n' + STEP, "was not written by melayer"),
        ('{"short_run_of": {}}\n' + STEP, "it does not begin with 'long_run_of'"),
        ('{"short_run_of": {}', "it does not begin with 'long_run_of'"),
        ('{"long_run_of": {}, "more": 1}\n' + STEP, "it does not begin with 'long_run_of'"),
        (HEAD + '{"step": {"m": 1, "result": 0.5}, "notes": []}\n', "line 2: n: Field required"),
        (HEAD + '{"step": {"n": "1", "result": 0.5}, "notes": []}\n', "line 2: n: input should be a valid integer"),
        (HEAD + '{"step": {"n": 1, "result": 0.5, "m": 1}, "notes": []}\n', "it has fields that this version does not"),
        (HEAD + '{"step": {"n": 1}, "notes": []}\n', "or lacks some"),
        (HEAD + '{"step": {"n": 1, "result": 0.5}}\n', "line 2: expected 'step' and 'notes'"),
        (HEAD + '{"step": {"n": 1, "result": 0.5}, "notes": "a"}\n', "line 2: notes: it: input should be a valid"),
        (HEAD + '{"stage": {"n": 1, "result": 0.5}, "notes": []}\n', "line 2: expected 'step' and 'notes'"),
        (HEAD + "1\n", "line 2: it: input should be an object"),
        (HEAD + "[" * 100_000 + "\n", "line 2: Invalid JSON"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(tmp_path, content, said):
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    with pytest.raises(MelayerError, match=said):
        opened(path, {})
    assert path.read_text() == content
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_lines_of_the_first_version_are_read_and_get_their_checksums(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(HEAD + STEP)
    log = opened(path, {})
    assert log.items == {1: Step(1)}
    assert path.read_text() == HEAD + STEP
    log.add(Step(2), [])
    assert path.read_text().count('"crc32"') == 3
    assert opened(path, {}).items == {1: Step(1), 2: Step(2)}


def test_what_other_names_point_to_stays_as_it_is(tmp_path):
    path, other, link = (tmp_path / name for name in ("run.jsonl", "copy.jsonl", "link.jsonl"))
    opened(path, {}).add(Step(1), [])
    before = path.read_bytes()
    other.hardlink_to(path)
    opened(path, {}).add(Step(2), [])
    assert other.read_bytes() == before
    assert opened(path, {}).items == {n: Step(n) for n in (1, 2)}
    link.symlink_to(other)
    with pytest.raises(OutputError, match="link.jsonl is a link, so it is left as it is"):
        opened(link, {})
    other.chmod(0o444)
    with pytest.raises(OutputError, match="copy.jsonl is read-only, so it is left as it is"):
        opened(other, {})
    assert other.read_bytes() == before


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "run.jsonl"
    log = opened(path, {"of": 12})
    for n in range(3):
        log.add(Step(n, 0.25 * n), [f"note {n}"])
    return path.read_bytes(), log


@given(st.data())
def test_whatever_byte_is_changed_or_cut_no_figure_becomes_another(kept, tmp_path_factory, data):
    content, log = kept
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    damage = damaged(content, data)
    path.write_bytes(damage)
    try:
        found = opened(path, {"of": 12})
    except MelayerError:
        assert path.read_bytes() == damage
        return
    assert found.items.items() <= log.items.items()
    assert found.notes.items() <= log.notes.items()


def test_a_file_that_was_removed_is_written_anew(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    log = opened(path, {})
    log.add(Step(1), [])
    path.unlink()
    path.parent.rmdir()  # nothing else was in it
    log.add(Step(2), ["b"])
    assert opened(path, {}).items == {n: Step(n) for n in (1, 2)}


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, room):
    path = tmp_path / "run.jsonl"
    log = opened(path, {})
    log.add(Step(1), [])
    before = path.read_bytes()
    room(len(before) + 20)
    with pytest.raises(OutputError, match="The long-run cannot be kept in .*File too large"):
        log.add(Step(2), [])
    room(None)
    assert path.read_bytes() == before


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"The long-run cannot be kept in .*Give another place"):
        opened(tmp_path / "file" / "run.jsonl", {})
    log = opened(tmp_path / "run.jsonl", {})
    log.path = tmp_path / "file" / "run.jsonl"
    with pytest.raises(OutputError, match=r"The long-run cannot be kept in .*Give another place"):
        log.add(Step(1), [])
