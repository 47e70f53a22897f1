"""The page on two models side by side."""

import json

import pytest

import hand_made
from hand_made import HOSTILE
from melayer.studies.contrast.report import section, write_contrast_report
from rendering import checked


@pytest.fixture(scope="module")
def parts():
    return checked(section(hand_made.contrasted()))


def test_every_part_is_there(parts):
    made = section(hand_made.contrasted())
    assert (made.key, made.title, made.answer) == ("contrast", "Before and after", hand_made.contrasted().sentence)
    assert list(parts) == ["contrast-magnitude", "contrast-sinks", "contrast-cosine", "The figures"]


def test_takeaways_are_computed(parts):
    assert parts["contrast-magnitude"].takeaway == (
        "It was 4,100 (block 2, dimension 5) and is 4,100 (block 2, dimension 5)."
    )
    assert parts["contrast-sinks"].takeaway == (
        "The ME layer is block 1 in both; the sink rate after block 1 went from 75.0% to 25.0%."
    )
    assert parts["contrast-cosine"].takeaway == (
        "From the ME layer until the state is erased it is at least 0.9999 before, 0.9999 after."
    )


def test_the_curves_of_both(parts):
    before, after = parts["contrast-sinks"].figure["data"]
    assert (before["name"], before["y"], before["line"]["dash"]) == ("before", [0.0, 12.5, None, 75.0], "dash")
    assert (after["name"], after["y"], after["line"]["dash"]) == ("after", [0.0, 0.0, None, 25.0], "solid")


def test_where_one_has_no_me_layer():
    parts = checked(section(hand_made.contrasted(after_me=None)))
    assert parts["contrast-cosine"].takeaway == ("One of the two has no ME layer, so there is no stretch to compare.")
    assert parts["The figures"].rows[0] == ["ME layer", "1", "—"]


def test_the_page(tmp_path):
    written = write_contrast_report(hand_made.contrasted(), tmp_path)
    html = written.html.read_text(encoding="utf-8")
    assert "<h1>[red]&lt;b&gt;:x:&lt;/b&gt;[/] and after</h1>" in html
    assert "<th>Texts</th><td>given: 2 texts, the same for both</td>" in html
    assert "<th>After</th><td>after, float32, fingerprint 0123</td>" in html
    values = json.loads(written.json.read_text())
    assert values["contrast"]["notes"] == [f"A note on {HOSTILE}."]
