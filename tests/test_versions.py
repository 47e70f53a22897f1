"""The page of versions is what was recorded, and the bounds in pyproject.toml are what was run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from packaging.version import Version

TOOLS = Path(__file__).parent.parent / "tools"


def script(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def versions_page():
    return script("versions_page")


@pytest.mark.records
def test_the_page_is_what_the_records_say(versions_page):
    # `python tools/versions_page.py` writes it again.
    assert versions_page.PAGE.read_text(encoding="utf-8") == versions_page.page()


@pytest.mark.records
def test_the_bounds_are_the_oldest_versions_that_were_run(versions_page):
    ran = [record["packages"] for record in versions_page.read_records() if record["dependencies"] == "oldest"]
    if not ran:
        pytest.skip("No session with the oldest dependencies is recorded: `make test-matrix`.")
    for name, (requirement, _) in versions_page.requirements().items():
        oldest = min((Version(packages[name]) for packages in ran if name in packages), default=None)
        if oldest is not None:
            assert versions_page.lower_bound(requirement) == Version(oldest.public), name


def test_a_session_that_was_not_run_is_said(versions_page, tmp_path, monkeypatch):
    monkeypatch.setattr(versions_page, "RECORDS", tmp_path)
    (tmp_path / "3.11-oldest.json").write_text(
        json.dumps(
            {
                "python": "3.11.7", "dependencies": "oldest", "machine": "Linux x86_64, CPU", "date": "2026-11-25",
                "selection": ["-m", "not demo", "tests/test_locate.py"], "passed": 1234, "failed": 1, "skipped": 5,
                "failures": ["tests.test_locate::test_it"], "seconds": 60, "packages": {"torch": "2.13.0+cpu"},
            }
        )
    )  # fmt: skip
    lines = versions_page.page().splitlines()
    row = "| 3.11.7 | oldest | part 1 | 1,234 | 1 | 5 | Linux x86_64, CPU | 2026-11-25 |"
    assert row in lines
    assert "Part 1 is what `nox -- -m 'not demo' tests/test_locate.py` runs." in lines
    assert "| `tests.test_locate::test_it` | 3.11.7 oldest |" in lines
    assert "| 3.12 | newest | not run |  |  |  |  |  |" in lines
    assert "| torch | 2.13.0 | 2.13.0 |" in lines
    assert "| numpy | not run | not run |" in lines


def test_a_record_counts_what_pytest_reported(tmp_path):
    record_versions = script("record_versions")
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite time="12.4"><testcase classname="a" name="passes"/>'
        '<testcase classname="a" name="fails"><failure/></testcase><testcase classname="a" name="breaks"><error/>'
        '</testcase><testcase classname="a" name="skips"><skipped/></testcase></testsuite></testsuites>'
    )
    out = tmp_path / "3.11-newest.json"
    assert record_versions.main(str(junit), str(out), "newest", "-k", "a") == 1
    record = json.loads(out.read_text())
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["selection"] == ["-k", "a"]
    assert (record["passed"], record["failed"], record["skipped"], record["seconds"]) == (1, 2, 1, 12)
    assert record["failures"] == ["a::breaks", "a::fails"]
    assert {"torch", "transformers", "lm_eval", "trl", "peft"} <= set(record["packages"])
    assert not {"ruff", "mypy"} & set(record["packages"])
