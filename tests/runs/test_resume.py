"""What is finished is read again; what is not ours, or of something else, is refused and left alone."""

import json

import pytest

from melayer.errors import InputError, OutputError
from melayer.runs.resume import begun, keep


def opened(path, subject):
    return begun(path, "long-run", subject, lambda value: value["n"])


def test_it_goes_on_with_what_was_kept(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    assert opened(path, {"of": (1, 2)}) == []
    for n in range(3):
        keep(path, "long-run", {"n": n})
    assert opened(path, {"of": [1, 2]}) == [0, 1, 2]  # as JSON holds it
    assert json.loads(path.read_text().splitlines()[0]) == {"long_run_of": {"of": [1, 2]}}


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    opened(path, {})
    keep(path, "long-run", {"n": 1})
    whole = path.read_bytes()
    keep(path, "long-run", {"n": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    assert opened(path, {}) == [1]
    assert path.read_bytes() == whole


def test_a_file_in_which_nothing_is_finished_is_begun_anew(tmp_path):
    path = tmp_path / "run.jsonl"
    opened(path, {"of": 1})
    assert opened(path, {"of": 2}) == []
    keep(path, "long-run", {"n": 1})
    assert opened(path, {"of": 2}) == [1]


def test_another_subject_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    opened(path, {"a": 1, "b": 2})
    keep(path, "long-run", {"n": 1})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"is of another long-run: b, c differ. Give another place, or remove it"):
        opened(path, {"a": 1, "c": 2})
    with pytest.raises(InputError, match=r"is of another long-run: a differs"):
        opened(path, {"a": 2, "b": 2})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["two\nlines\n", '{"a": 1}\n{"n": 1}\n', '{"long_run_of": {}}\n{"m": 1}\n', "1\n2\n"]
)
def test_a_file_that_is_not_ours_is_refused(tmp_path, content):
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"holds no long-run that can be read"):
        opened(path, {})
    assert path.read_text() == content


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"The long-run cannot be kept in .*Give another place"):
        opened(tmp_path / "file" / "run.jsonl", {})
