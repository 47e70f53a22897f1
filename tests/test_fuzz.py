"""The inputs that fuzzing has found are still read or refused."""

from pathlib import Path

import pytest

from test_versions import script

CORPUS = Path(__file__).parent / "fuzz_corpus"
KEPT = sorted(CORPUS.glob("*/*"))


@pytest.fixture(scope="module")
def fuzz():
    return script("fuzz")


@pytest.mark.parametrize("file", KEPT, ids=[f"{file.parent.name}-{file.name[:12]}" for file in KEPT])
def test_what_was_found_is_read_or_refused(fuzz, file, tmp_path):
    fuzz.read(file.parent.name, file.read_bytes(), tmp_path)


def test_each_target_has_seeds_that_are_read(fuzz, tmp_path):
    """Else every input would be refused at once, and nothing behind that be tried."""
    assert {file.parent.name for file in KEPT} == set(fuzz.TARGETS)
    for target in fuzz.TARGETS:
        place = tmp_path / target
        place.mkdir()
        assert fuzz.read(target, (CORPUS / target / "whole").read_bytes(), place), target
