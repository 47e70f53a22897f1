import io

import pytest
from rich.console import Console

import melayer
import toys
from melayer.terminal import show_locate


def printed(result, width: int = 80) -> str:
    file = io.StringIO()
    show_locate(result, Console(file=file, width=width))
    return file.getvalue()


@pytest.fixture(scope="module")
def result():
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    return melayer.locate(model, toys.tokenizer(), texts=[toys.text(20, x_at=4), "w1 w2"], name="toy [bold]")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_ever_cut(result, width):
    lines = printed(result, width).splitlines()
    assert all(len(line) <= width for line in lines)
    shown = next(line for line in lines if "<- ME layer" in line)
    row = result.blocks[3]
    assert shown.split() == [
        "3", f"{row.max_abs:,.1f}", f"{row.ratio:,.0f}", "4", "X", "7", "1", "1/1", "+100.0%", "<-", "ME", "layer",
    ]  # fmt: skip


def test_markup_in_names_is_text(result):
    assert "toy [bold]" in printed(result)


def test_notes_and_texts_are_shown(result):
    text = printed(result)
    assert "Too short to vote on the ME layer (fewer than 8 tokens): 1 of 2 texts." in text
    assert "too short" in text.rpartition("Texts")[2]
