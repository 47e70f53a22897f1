"""The sentence model on a disk that is full, and one that was half written before."""

import pytest

from melayer.errors import OutputError
from melayer.evaluation import punkt

PLACE = "nltk/tokenizers/punkt_tab/english"


@pytest.fixture(autouse=True)
def _nothing_at_hand(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])


def test_one_that_was_half_written_is_completed(tmp_path):
    (tmp_path / PLACE).mkdir(parents=True)
    (tmp_path / PLACE / "abbrev_types.txt").write_text("dr\n")
    punkt.provide_punkt()
    names = {path.name: path.stat().st_size for path in (tmp_path / PLACE).iterdir()}
    assert set(names) == {"abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab"}
    assert names["abbrev_types.txt"] > 100


def test_it_is_written_once(tmp_path, monkeypatch):
    import nltk

    punkt.provide_punkt()
    written = (tmp_path / PLACE / "ortho_context.tab").stat().st_mtime_ns
    monkeypatch.setattr(nltk.data, "path", [])  # as in another process
    punkt.provide_punkt()
    assert (tmp_path / PLACE / "ortho_context.tab").stat().st_mtime_ns == written
    punkt.provide_punkt()
    assert nltk.data.path == [str(tmp_path / "nltk")]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "nltk").write_text("a file")
    with pytest.raises(
        OutputError, match="The sentence model for IFEval cannot be written to .*: Not a directory. Free"
    ):
        punkt.provide_punkt()
