"""Files of ours are read back as what they were written as, or not at all."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melayer.errors import InputError, OutputError
from melayer.runs import records


@dataclass(frozen=True)
class Point:
    """Something that is kept."""

    name: str
    dims: tuple[int, ...]
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError("share is above 1")


def parsed(content: str | bytes) -> Point:
    return records.parse(content, Point, "point.json cannot be read as a point", "Save it again.")


def test_what_is_right_is_read() -> None:
    assert parsed('{"name": "a", "dims": [1, 2], "share": 1}') == Point("a", (1, 2), 1.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "a", "dims": "12"}', "dims: input should be a valid array, and '12' stands there"),
        ('{"name": "a", "dims": [1, "2"]}', "dims.1: input should be a valid integer, and '2' stands there"),
        ('{"name": "a", "dims": [true]}', "dims.0: input should be a valid integer, and True stands there"),
        ('{"name": 7, "dims": []}', "name: input should be a valid string, and 7 stands there"),
        ('{"dims": []}', "name: Field required"),
        ('{"name": "a", "dims": [], "share": 2}', "share is above 1"),
        ("[1]", "it: input should be an object, and [1] stands there"),
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded at line 1 column 20"),
        (b"\xff\xfe", "Invalid JSON: expected value at line 1 column 1"),
    ],
)
def test_what_is_wrong_is_named(content: str | bytes, said: str) -> None:
    with pytest.raises(InputError) as raised:
        parsed(content)
    assert str(raised.value).startswith(f"point.json cannot be read as a point: {said}")
    assert str(raised.value).endswith(". Save it again.")


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_whatever_the_bytes_it_is_a_value_or_our_error(content: bytes | str) -> None:
    with pytest.raises(InputError, match="cannot be read as a point"):
        parsed(content)


def test_a_file_that_is_none(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "none.json", Point, "x", "y")
    with pytest.raises(OutputError, match=r"point cannot be read: it is a directory and no file. Give another place."):
        records.read(tmp_path, Point, "point cannot be read", "Give another place.", OutputError)
