"""The README's code runs, prints what it says, and its figures come from the command it names."""

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

import melayer
from melayer import cli
from melayer.measurements.locate.table import show_locate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
# The repository's addresses of a page and of an image.
OWN = ("https://github.com/melayer/melayer/blob/main/", "https://raw.githubusercontent.com/melayer/melayer/main/")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.demo
def test_the_python_example_prints_what_its_comments_say(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(promised) == 7
    assert lines[1:] == promised
    assert (tmp_path / "demo-report" / "report.html").exists()


@pytest.mark.demo
def test_the_output_shown_is_the_output(demo):
    from rich.console import Console

    file = io.StringIO()
    show_locate(melayer.locate(demo.model, demo.tokenizer, name="demo"), Console(file=file, width=80))
    actual = [line.rstrip() for line in file.getvalue().splitlines()]
    (shown,) = blocks("text")
    for line in shown.splitlines():
        assert line == "…" or any(same_up_to_rounding(line, other) for other in actual), line


NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def same_up_to_rounding(line: str, other: str) -> bool:
    """Whether two lines differ at most by one in the last digit of measured numbers: the last bits that are lost in a
    sum are another processor's, and a figure may stand where it is rounded up by one and down by the other."""
    if NUMBER.sub("#", line) != NUMBER.sub("#", other):
        return False
    for one, two in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
        measured = "." in one or "," in one  # counts, places and ratios below a thousand are what they are
        apart = abs(float(one.replace(",", "")) - float(two.replace(",", "")))
        if one != two and not (measured and apart < 1.5 * 10.0 ** -len(one.partition(".")[2])):
            return False
    return True


def test_only_the_last_digit_of_a_measured_number_may_differ():
    line = "   11 28,317.2 12,835     0 \\xe6     507      12   7/7 +99.8%"
    for old, new, same in (
        ("28,317.2", "28,317.3", True),
        ("28,317.2", "28,317.4", False),
        ("12,835", "12,834", True),
        ("+99.8", "+99.9", True),
        ("+99.8", "-99.8", False),
        ("507", "508", False),
        ("11", "12", False),
        ("xe6", "xe7", False),
        ("0 ", "0  ", False),
    ):
        assert same_up_to_rounding(line, line.replace(old, new, 1)) == same, new
    assert same_up_to_rounding("-0.0%", "+0.0%") is True


DOCUMENTS = README + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
FUNCTIONS = [name for name in melayer.__all__ if inspect.isfunction(getattr(melayer, name))]
CLASSES = [name for name in melayer.__all__ if inspect.isclass(getattr(melayer, name))]
COMMANDS = typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented(name):
    assert f"melayer.{name}(" in DOCUMENTS


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith(("Result", "Error"))])
def test_every_public_class_is_documented(name):
    # What comes back and what is raised stand in the functions' own docstrings.
    assert re.search(rf"\b{name}\b", DOCUMENTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"melayer {command} " in DOCUMENTS


def links(text: str) -> list[str]:
    """Where the links and the images of a page lead."""
    inline = [child for token in MarkdownIt().enable("table").parse(text) for child in token.children or ()]
    return [str(token.attrs[name]) for token in inline for name in ("href", "src") if name in token.attrs]


def file_of(link: str, page: Path) -> Path | None:
    """The file of this repository that a link leads to; None for a link that leads elsewhere."""
    target = link.partition("#")[0]
    for beginning in OWN:
        if target.startswith(beginning):
            return ROOT / target.removeprefix(beginning)
    return None if re.match(r"\w+:", target) else page.parent / target if target else page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        file = file_of(link, page)
        assert file is None or file.exists(), link


def test_the_readme_has_no_relative_links():
    # It is also shown by the package index, where they would lead nowhere.
    found = links(README)
    assert len(found) > 20
    assert [link for link in found if not link.startswith("https://")] == []


def test_the_link_check_can_fail():
    assert links("[a](docs/a.md), [b], ![c](c.png)\n\n| [d] |\n|---|\n\n[b]: b.md\n[d]: d.md\n") == [
        "docs/a.md", "b.md", "c.png", "d.md",
    ]  # fmt: skip
    assert not file_of(f"{OWN[0]}docs/no-such-page.md#there", ROOT / "README.md").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_into_120_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    # A row of a table cannot be wrapped, nor can an address.
    long = [line for line in lines if len(line) > 120 and not re.match(r"\||\[\S+\]: \S+$", line)]
    assert long == []
