"""The comparison of two recordings: what counts as a difference, and what is left out."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TOOLS = Path(__file__).parent.parent / "tools"
EXACT, NEAR = (0.0, 0.0), (1e-6, 0.0)


@pytest.fixture
def same_results(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module("same_results")
    for name in [name for name in sys.modules if name.startswith("same_results")]:
        del sys.modules[name]


def recording(directory, stdout="", *, stderr="", code=0, name="a-case", toys="0", files=()):
    """A recording of one case that has printed this."""
    place = directory / "cases" / name
    (place / "out").mkdir(parents=True)
    about = {"source": f"{directory}/src", "out": str(directory), "toys": "/toys", "toys_sha256": toys}
    (directory / "recording.json").write_text(json.dumps(about))
    (place / "case.json").write_text(json.dumps({"commands": [["x"]], "exit_codes": [code], "seconds": id(place)}))
    (place / "0.stdout").write_text(stdout if isinstance(stdout, str) else json.dumps(stdout))
    (place / "0.stderr").write_text(stderr)
    for file, text in files:
        (place / "out" / file).write_text(text)
    return directory


@pytest.fixture
def compared(same_results, tmp_path, capsys):
    """Whether two recordings are the same, and what is said about them."""

    def compare(first, second, tolerance=EXACT):
        code = same_results.compare(first, second, [], same_results.Tolerance(*tolerance))
        return code == 0, capsys.readouterr().out

    return compare


VALUES = {"melayer_version": "1", "seconds": 2.5, "rows": [{"nll": 0.1, "n": 3}, []], "sentence": "It is 2.5 of 3."}


def changed(**values):
    return {**json.loads(json.dumps(VALUES)), **values}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (changed(), None),
        (changed(melayer_version="2", seconds=9), None),
        (changed(rows=[{"nll": 0.10000000000000002, "n": 3}, []]), ".rows[0].nll: 0.1 became 0.10000000000000002"),
        (changed(rows=[{"nll": 0.1, "n": 3.0}, []]), ".rows[0].n: 3 became 3.0"),
        (changed(rows=[{"nll": 0.1, "n": True}, []]), ".rows[0].n: 3 became True"),
        (changed(rows=[{"nll": 0.1, "n": None}, []]), ".rows[0].n: 3 became None"),
        (changed(rows=[{"n": 3, "nll": 0.1}, []]), "the order of the keys differs"),
        (changed(rows=[{"nll": 0.1}, []]), ".rows[0].n: 3 is not there any more"),
        (changed(rows=[{"nll": 0.1, "n": 3}, {}]), ".rows[1]: [] became {}"),
        (changed(more=1), ".more: 1 was not there before"),
        (changed(sentence="It is 2.5 of 4."), "'It is 2.5 of 3.' became 'It is 2.5 of 4.'"),
    ],
)
def test_json_is_compared_value_by_value(compared, tmp_path, other, said):
    same, told = compared(recording(tmp_path / "a", VALUES), recording(tmp_path / "b", other))
    assert same == (said is None), told
    assert said is None or said in told


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (1.0, 1.0 + 1e-7, True),
        (1.0, 1.0 + 1e-5, False),
        (1, 1.0, True),
        (1, True, False),
        ("It is 1,000.0001 of 3.", "It is 1,000.0002 of 3.", True),
        ("It is 1,000 of 3.", "It is 1,001 of 3.", False),
        ("It is 1,000 of 3.", "It was 1,000 of 3.", False),
        ("fa5", "fa6", False),
    ],
)
def test_a_tolerance_is_for_numbers_also_within_texts(same_results, first, second, same):
    assert same_results.Tolerance(*NEAR).same(first, second) == same
    assert not same_results.Tolerance(*EXACT).same(first, second)


def test_text_is_compared_line_by_line_without_what_differs_from_run_to_run(compared, tmp_path):
    text = "Made 2{}-01-02T03:04:05+00:00 with torch {}.1.0 in {}\n"
    sides = [
        recording(tmp_path / name, text.format(number, number, f"{tmp_path / name}/src/x.py"))
        for name, number in (("a", "021"), ("b", "022"))
    ]
    assert compared(*sides)[0]
    same, told = compared(sides[0], recording(tmp_path / "c", text.format("023", "3", "elsewhere")))
    assert not same
    assert "0.stdout:1" in told


def test_figures_of_a_page_are_values_whatever_the_order_of_their_keys(compared, tmp_path):
    page = '<html>\n<script type="application/json" id="figures">{}</script>\n</html>\n'
    first, same, other = (
        recording(tmp_path / name, page.format(json.dumps({"a": values})))
        for name, values in (("a", {"x": 1, "y": [2]}), ("b", {"y": [2], "x": 1}), ("c", {"y": [3], "x": 1}))
    )
    assert compared(first, same)[0]
    differs, told = compared(first, other)
    assert not differs
    assert "0.stdout:2 .a.y[0]: 2 became 3" in told


def test_exit_codes_stderr_and_files_count(compared, tmp_path):
    given = {"stderr": "melayer: no.", "code": 2, "files": [("report.json", '{"a": 1}'), ("scan.0.state", "1")]}
    first = recording(tmp_path / "a", **given)
    assert compared(
        first, recording(tmp_path / "b", **{**given, "files": [*given["files"][:1], ("scan.0.state", "2")]})
    )[0]
    for name, more, said in (
        ("c", {"stderr": "melayer: yes."}, "'melayer: no.' became 'melayer: yes.'"),
        ("d", {"code": 1}, ".exit_codes[0]: 2 became 1"),
        ("e", {"files": given["files"][1:]}, "out/report.json: 'file' is not there any more"),
        ("f", {"files": [("report.json", '{"a": 2}'), *given["files"][1:]]}, "out/report.json .a: 1 became 2"),
    ):
        same, told = compared(first, recording(tmp_path / name, **{**given, **more}))
        assert not same
        assert said in told


def test_tensors_are_compared_element_by_element(compared, tmp_path):
    sides = []
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23)):
        sides.append(recording(tmp_path / name))
        save_file({"keys": torch.tensor([[0.5, value]])}, sides[-1] / "cases/a-case/out/prefix.safetensors")
    assert compared(*sides[:2])[0]
    assert "prefix.safetensors keys[1]: 1.0 became 1.0000001" in compared(sides[0], sides[2])[1]
    assert compared(sides[0], sides[2], NEAR)[0]


def test_a_case_on_one_side_only_is_a_difference(compared, tmp_path):
    same, told = compared(recording(tmp_path / "a"), recording(tmp_path / "b", name="another"))
    assert not same
    assert told.count("differs") == 2


def test_different_toys_are_no_comparison(same_results, tmp_path):
    with pytest.raises(SystemExit, match="different toys"):
        same_results.compare(
            recording(tmp_path / "a"), recording(tmp_path / "b", toys="1"), [], same_results.Tolerance(0, 0)
        )


def test_another_melayer_than_the_given_one_is_refused(same_results, tmp_path):
    with pytest.raises(SystemExit, match="but melayer comes from"):
        same_results.check_tree(
            tmp_path / "empty", same_results.environment_for(TOOLS.parent / "src", tmp_path), tmp_path
        )


def test_a_forked_command_gives_what_one_of_its_own_gives(same_results, tmp_path):
    """Also where it fails, and where melayer writes a file."""
    (tmp_path / "text.txt").write_text("w1 w2\n")
    cases = importlib.import_module("same_results_cases")
    commands = (("locate", "nowhere"), ("locate", "--help"), ("find",), ("sweep", "nowhere", "--rates", "x"))
    found = []
    runner = same_results.Runner(tmp_path, same_results.environment_for(TOOLS.parent / "src", tmp_path))
    try:
        for fresh in (True, False):
            runner.run(cases._case("case", *commands, fresh=fresh))
            found.append(dict(same_results.leaves(tmp_path / "cases" / "case", [])))
    finally:
        runner.close()
    assert found[0] == found[1]
    assert [found[0][f".exit_codes[{place}]"] for place in range(4)] == [2, 0, 2, 2]
