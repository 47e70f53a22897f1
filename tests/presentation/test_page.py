"""The page writer: what every report has in common, and that nothing is lost when it cannot be written."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import melayer
from hand_made import HOSTILE
from hostile import stores
from melayer.errors import OutputError
from melayer.presentation import figures
from melayer.presentation.page import Page, check_writable, made_by, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table
from melayer.runs import ours

ESCAPED = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
PLOT = Plot("p", "Plot", "It is.", "Read it.", {"data": [], "layout": {}})
SECTIONS = (
    Section("first", "First", f"The answer: {HOSTILE}.", (Table("table", ["a"], [[1]]),)),
    Section("second", "Second", "The second answer.", (PLOT,)),
)  # fmt: skip
PAGE = Page(
    HOSTILE, SECTIONS, (f"A note on {HOSTILE}.",), [("Model", HOSTILE)], {"found": {"a": 1.5}}, {"device": "cpu"}
)


def own_part(path: Path) -> str:
    """The page without plotly.js and our own script."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def facts(html: str) -> list[tuple[str, str]]:
    return re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", html)


def test_the_page_says_what_it_was_given(tmp_path):
    written = write_page(PAGE, tmp_path / "a" / "b", command=f"melayer '{HOSTILE}'")
    assert (written.html, written.json) == (tmp_path / "a/b/report.html", tmp_path / "a/b/report.json")
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["report.html", "report.json"]
    html = own_part(written.html)
    assert f"<title>Massive activations of {ESCAPED}</title>" in html
    assert f"<h1>{ESCAPED}</h1>" in html
    assert f'<p class="note">A note on {ESCAPED}.</p>' in html
    assert "<b>" not in html
    # The page opens with the first section's answer, which is not said again.
    assert re.findall(r'<p class="answer">(.*?)</p>', html) == [f"The answer: {ESCAPED}.", "The second answer."]
    assert [name for name, _ in facts(html)] == ["Model", "Made", "Command"]
    assert facts(html)[2][1] == f"melayer &#39;{ESCAPED}&#39;"


def test_the_values_are_beside_it_with_their_provenance(tmp_path):
    written = write_page(PAGE, tmp_path, command="melayer x")
    values = json.loads(written.json.read_text(encoding="utf-8"))
    assert list(values) == ["melayer_version", "provenance", "found"]
    assert values["melayer_version"] == melayer.__version__
    assert values["found"] == {"a": 1.5}
    date = values["provenance"].pop("date")
    assert values["provenance"] == {"command": "melayer x", "device": "cpu"}
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(date) < timedelta(minutes=5)
    assert ("Made", date) in facts(own_part(written.html))


def test_without_a_command_none_is_named(tmp_path):
    written = write_page(PAGE, str(tmp_path))
    assert [name for name, _ in facts(own_part(written.html))] == ["Model", "Made"]
    assert json.loads(written.json.read_text())["provenance"]["command"] is None


def test_no_text_closes_the_script_that_holds_the_figures(tmp_path):
    line = figures.line("a", ["</script><script>alert(1)</script>"], [1.0], figures.stroke(figures.BLUE))
    plot = Plot("p", "Plot", "It is.", "Read it.", figures.figure([line], None, {}))
    section = Section("s", "S", "Answer.", (plot,))
    html = write_page(Page("m", [section], (), (), {}), tmp_path).html.read_text(encoding="utf-8")
    held = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL).group(1)
    assert "<" not in held
    assert json.loads(held)["p"]["data"][0]["x"] == ["</script><script>alert(1)</script>"]


def test_what_json_cannot_hold_is_null_or_escaped(tmp_path):
    """JSON has no NaN, and UTF-8 no lone surrogates, which a file name in another encoding is made of."""
    section = Section("s", "caf\udce9", "Answer \udce9.", (Table("table", ["a"], [["\ud800"]]),))
    values = {"found": float("nan"), "above": float("inf"), "name \udce9": ("caf\udce9", 1.5)}
    written = write_page(Page("caf\udce9", [section], (), (), values), tmp_path, command="melayer caf\udce9")
    text = written.json.read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=pytest.fail)
    assert (found["found"], found["above"]) == (None, None)
    assert found["name \\udce9"] == ["caf\\udce9", 1.5]
    assert found["provenance"]["command"] == "melayer caf\\udce9"
    assert "<h1>caf\\udce9</h1>" in own_part(written.html)


def files(directory):
    return stores.found(directory)


@pytest.mark.parametrize("name", ["report.html", "report.json"])
@pytest.mark.parametrize("kind", stores.KINDS)
def test_what_others_put_there_stays(tmp_path, name, kind):
    stores.KINDS[kind](tmp_path / name)
    before = files(tmp_path)
    for write in (check_writable, lambda out: write_page(PAGE, out)):
        with pytest.raises(OutputError, match=f"{name} is|{name} was not written by melayer"):
            write(tmp_path)
    assert files(tmp_path) == before


def test_a_page_of_ours_is_replaced(tmp_path):
    written = write_page(PAGE, tmp_path)
    assert ours.written_by_melayer(written.html)
    assert ours.written_by_melayer(written.json)
    write_page(replace(PAGE, name="another"), tmp_path)
    assert "<h1>another</h1>" in own_part(written.html)
    # As the first version wrote it, without a generator.
    written.html.write_text(re.sub("<meta name=.generator.*?>\n", "", written.html.read_text(), count=1))
    write_page(PAGE, tmp_path)
    assert f"<h1>{ESCAPED}</h1>" in own_part(written.html)


def test_by_which_command_it_was_made(tmp_path):
    assert made_by(tmp_path) is None
    write_page(PAGE, tmp_path)
    assert made_by(tmp_path) is None
    write_page(PAGE, tmp_path, command="melayer locate x")
    assert made_by(tmp_path) == "melayer locate x"
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(OutputError, match="report.json cannot be read as a report"):
        made_by(tmp_path)


def test_versions():
    assert versions_fact({"torch": "2.13", "python": "3.11"}) == ("Versions", "torch 2.13, python 3.11")


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/melayer")):
        for write in (check_writable, lambda out: write_page(PAGE, out)):
            with pytest.raises(
                OutputError, match=f"The report cannot be written to {out}: .* Give another directory with --out."
            ):
                write(out)


def test_trying_leaves_nothing_but_the_directory(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(("limit", "name"), [(100, "report.json"), (30_000, "report.html")])
def test_a_full_disk_keeps_the_old_report(limit, name, tmp_path, room):
    write_page(PAGE, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    room(limit)
    with pytest.raises(
        OutputError,
        match=f"{name} cannot be written: File too large. Free some space or give another directory with --out.",
    ):
        write_page(PAGE, tmp_path)
    room(None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
