"""Figures hold what plotly.js knows, and nothing in their names is markup."""

import plotly.graph_objects as go
import pytest

from melayer.presentation import figures
from melayer.presentation.figures import BLUE, GREY, ORANGE, axis, hover, label, stroke

NAME = "<b>x</b> & y"


def test_a_line():
    trace = figures.line("sinks", range(3), [1.0, None, 2.0], stroke(BLUE, dash="dot"), template=hover("%{x}", "n"))
    assert trace == {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "sinks",
        "x": [0, 1, 2],
        "y": [1.0, None, 2.0],
        "line": {"color": BLUE, "dash": "dot", "width": 2},
        "marker": {"size": 5},
        "hovertemplate": "%{x}<extra>n</extra>",
    }
    bare = figures.line("sinks", [0], [1.0], stroke(BLUE, width=None), marker=None)
    assert bare["mode"] == "lines"
    assert bare["line"] == {"color": BLUE}
    assert not {"marker", "hovertemplate"} & bare.keys()


def test_bars_and_their_whiskers():
    bars = figures.bar(["a", "b"], [1.0, None], BLUE, template=hover("%{x}"), name="n")
    assert bars == {
        "type": "bar",
        "x": ["a", "b"],
        "y": [1.0, None],
        "marker": {"color": BLUE},
        "hovertemplate": "%{x}<extra></extra>",
        "name": "n",
    }
    assert "name" not in figures.bar([], [], BLUE, template="")
    assert figures.whiskers([1.0], [0.5], thickness=1) == {
        "type": "data",
        "symmetric": False,
        "array": [1.0],
        "arrayminus": [0.5],
        "thickness": 1,
    }


def test_a_heat_map_says_no_more_than_it_is_given():
    squares = figures.heat_map([[1.0, None]], "%", template=hover("%{z}"), limits=(0, None), x=["a", "b"])
    assert squares["colorbar"] == {"title": {"text": "%"}, "thickness": 12}
    assert (squares["zmin"], squares["x"]) == (0, ["a", "b"])
    assert not {"zmax", "y"} & squares.keys()
    assert figures.heat_map([[1.0]], "%", template="", thickness=None)["colorbar"] == {"title": {"text": "%"}}


def test_a_waterfall_ends_in_the_sum():
    assert figures.waterfall(["a", "b", "all"], [1.0, 2.0, 3.0], template="")["measure"] == [
        "relative", "relative", "total",
    ]  # fmt: skip


def test_a_figure_has_its_axes_and_the_rest_of_the_layout():
    made = figures.figure([], axis("block", type="log"), axis(autorange="reversed"), {"height": 5}, {"height": 6})
    assert made == {
        "data": [],
        "layout": {
            "xaxis": {"title": {"text": "block"}, "type": "log"},
            "yaxis": {"autorange": "reversed"},
            "height": 6,
        },
    }
    assert "xaxis" not in figures.figure([], None, axis("y"))["layout"]


def test_height_grows_with_the_rows():
    assert figures.height(10, 13, beside=120, least=360) == {"height": 360}
    assert figures.height(100, 13, beside=120, least=360) == {"height": 1420}


def test_a_marked_place():
    made = figures.marked(3, "ME layer 3")
    assert made["shapes"] == [figures.vertical(3, stroke(ORANGE))]
    (name,) = made["annotations"]
    assert (name["x"], name["text"], name["font"]) == (3, "ME layer 3", {"color": ORANGE})
    assert figures.marked(None, "nowhere") == {"shapes": [], "annotations": []}


def test_lines_across():
    assert figures.vertical(2, stroke(GREY)) == {
        "type": "line", "x0": 2, "x1": 2, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 2},
    }  # fmt: skip
    assert figures.horizontal(2, stroke(GREY)) == {
        "type": "line", "y0": 2, "y1": 2, "xref": "paper", "x0": 0, "x1": 1, "line": {"color": GREY, "width": 2},
    }  # fmt: skip


def test_a_menu_shows_one_group_at_a_time():
    traces = figures.first_shown([{"name": str(n)} for n in range(6)], 2)
    assert [trace["visible"] for trace in traces] == [True, True, False, False, False, False]
    (menu,) = figures.menu(["a", "b", "c"], 2)["updatemenus"]
    shown = [button["args"][0]["visible"] for button in menu["buttons"]]
    assert shown == [[place // 2 == group for place in range(6)] for group in range(3)]
    assert shown[menu["active"]] == [trace["visible"] for trace in traces]


def test_names_are_no_markup():
    assert label(NAME) == "&lt;b&gt;x&lt;/b&gt; &amp; y"
    assert label('"quoted"') == '"quoted"'
    traces = [figures.line(NAME, [0], [1.0], stroke(BLUE)), figures.bar([0], [1.0], BLUE, template="", name=NAME)]
    assert [trace["name"] for trace in traces] == [label(NAME)] * 2
    assert figures.menu([NAME])["updatemenus"][0]["buttons"][0]["label"] == label(NAME)
    assert hover("%{x}", NAME) == f"%{{x}}<extra>{label(NAME)}</extra>"


def every_kind():
    trace = figures.heat_map([[1.0]], "%", template=hover("%{z}"), limits=(0, 100), x=["a"], y=["b"])
    line = figures.line("a", [0], [1.0], stroke(BLUE, dash="dash"), template=hover("%{y}"))
    bar = figures.bar(["a"], [1.0], BLUE, template=hover("%{y}"), name="b")
    points = figures.points([0], ["a"], {"size": 3, "color": [BLUE]}, template=hover("%{y}"))
    marked = figures.marked(1, "here") | figures.menu(["a"]) | figures.height(1, 1, beside=1, least=100)
    plain = figures.figure([line, bar | {"error_y": figures.whiskers([1.0], [1.0], color=GREY)}], axis("x"), axis("y"))
    yield plain
    yield figures.figure([trace], axis("x", dtick=1), axis("y", autorange="reversed"), marked)
    yield figures.figure([points, figures.waterfall(["a"], [1.0], template="")], None, axis("y", type="log"))
    yield figures.scene([figures.surface([0], [0], [[1.0]], template=hover(""))], axis("x"), axis("y"), axis("z"))


@pytest.mark.parametrize("figure", list(every_kind()))
def test_plotly_knows_every_option(figure):
    """plotly's own classes refuse a name or a value that plotly.js does not have."""
    go.Figure(figure)


def test_plotly_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="widht"):
        go.Figure({"data": [{"type": "bar", "widht": 1}]})
