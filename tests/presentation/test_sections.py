"""What a section's parts become on the page."""

import re

from hand_made import HOSTILE
from melayer.presentation import figures
from melayer.presentation.sections import Plot, Section, Table
from rendering import page

PLOT = Plot(
    key="key",
    title=f"title {HOSTILE}",
    takeaway=f'takeaway "{HOSTILE}"',
    reading=f"reading {HOSTILE}",
    figure=figures.figure([], None, figures.axis("y")),
)


def made(*parts):
    return page(Section("section", f"section {HOSTILE}", f"answer {HOSTILE}", parts))


def test_a_plot_has_its_words_around_its_place():
    html = made(PLOT)
    escaped = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert '<section id="section">' in html
    assert f"<h2>section {escaped}</h2>" in html
    assert f"<h3>title {escaped}</h3>" in html
    assert f'<p class="takeaway">takeaway &#34;{escaped}&#34;</p>' in html
    assert f"<figcaption>reading {escaped}</figcaption>" in html
    place = re.search(r'<div class="plot" id="plot-key" role="img" aria-label="([^"]*)"></div>', html)
    assert place.group(1) == f"title {escaped}: takeaway &#34;{escaped}&#34;"


def test_a_table_shows_text_and_numbers():
    html = made(Table("title", ["name", HOSTILE], [["a", 1], [HOSTILE, "1.5"]], takeaway="What follows."))
    assert "<h3>title</h3>" in html
    assert "<th>name</th><th>[red]&lt;b&gt;:x:&lt;/b&gt;[/]</th>" in html
    assert "<td>a</td><td>1</td>" in html
    assert "<td>[red]&lt;b&gt;:x:&lt;/b&gt;[/]</td><td>1.5</td>" in html
    assert '<p class="takeaway">What follows.</p>' in html
    assert "<details>" not in html
    assert 'class="prose"' not in html


def test_a_table_can_be_folded_away_and_hold_prose():
    html = made(Table("title", ["name"], [["a"]], folded=True, prose=True))
    assert "<details><summary>title</summary>" in html
    assert '<table class="prose">' in html
    assert "takeaway" not in html


def test_a_table_without_rows_has_its_words_alone():
    html = made(Table("title", ["name"], [], takeaway="There is nothing."))
    assert "There is nothing." in html
    assert "<table" not in html
