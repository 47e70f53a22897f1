"""A terminal's table: no number is cut, and text is shown as it is."""

import pytest

from hand_made import HOSTILE
from melayer.presentation import tables
from rendering import printed

COLUMNS = [("name", False), ("value", True), ("begins", False)]
ROWS = [["a", "1,234.5", "some words that go on"], ["a long name", -1, "short"]]


def show(console):
    console.print(tables.table("A title", COLUMNS, ROWS))


def test_a_table_to_the_letter():
    assert printed(show, width=60) == (
        "\nA title\nname          value begins\na           1,234.5 some words that go on\na long name      -1 short"
    )


@pytest.mark.parametrize("width", [20, 27, 35])
def test_where_it_is_narrow_text_gives_way_and_no_number(width):
    lines = printed(show, width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert sum("1,234.5" in line for line in lines) == 1
    assert sum("-1" in line.split() for line in lines) == 1


def test_nothing_shown_is_markup():
    def hostile(console):
        console.print(tables.table(HOSTILE, [(HOSTILE, False)], [[HOSTILE], ["[/]"]]))
        tables.print_answer(console, HOSTILE, [f"A note: {HOSTILE}", "[/]"])
        tables.print_text(console, HOSTILE, style="dim")

    assert printed(hostile).splitlines() == [
        "", HOSTILE, HOSTILE, HOSTILE, "[/]", HOSTILE, f"A note: {HOSTILE}", "[/]", HOSTILE,
    ]  # fmt: skip


def test_where_there_is_no_number():
    assert [tables.number(None), tables.percent(None), tables.share(None)] == ["-", "-", "-"]
    assert [tables.number(1234.5, 1), tables.percent(0.5), tables.share(-0.0001)] == ["1,234.5", "50.0%", "0.0%"]
