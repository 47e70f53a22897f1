"""Make docs/versions.md of the records in results/versions/, which `make test-matrix` leaves.

python tools/versions_page.py            # writes the page
python tools/versions_page.py --check    # exit code 1 where the page is not what the records say
"""

import json
import re
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "results" / "versions"
PAGE = ROOT / "docs" / "versions.md"
DEPENDENCIES = ("oldest", "newest")

HEAD = """\
# Versions

`make test-matrix` runs the tests on every Python that melayer supports, with the oldest dependencies that
`pyproject.toml` allows and with the newest that there are, each time in an environment of its own (`noxfile.py`). This
page is made of the records that it leaves in [results/versions/](../results/versions), by `tools/versions_page.py`.
"""

NOTES = """\
## What is known beyond that

- Python 3.10 is not supported: transformers needs 3.11 from 5.21 on.
- transformers before 5.24 is not allowed. From 5.0 on the core runs with it, but the tokenizers that it reads from a
  GGUF file are wrong (5.0's adds a begin-of-sequence token, 5.8's has the wrong end of sequence), and with 5.23 a chat
  template's marks of the assistant's turns are not where the loss is (`tests/tuning/test_run.py`).
- accelerate before 1.15 is not allowed: it refuses a `device_map` that puts all blocks on the disk
  (`tests/cli/test_scanning.py`; 1.10.1 to 1.14.0 tried).
- Before there was a matrix, the whole suite passed on Python 3.11 with torch 2.13.0, transformers 5.23.0 and 5.24.0,
  accelerate 1.10.0 to 1.15.0, gguf 0.17.1 to 0.19.0, numpy 2.0.2 to 2.4.6, plotly 6.4.0 to 7.1.0.
- jinja2 before 3.1.6 is not allowed: transformers refuses to render a chat template with it.
- What is oldest depends on the Python: of the packages with compiled parts, the oldest release that has a wheel for it.
"""


def read_records() -> list[dict[str, Any]]:
    """The records, by Python and then from oldest to newest dependencies."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*.json")]
    return sorted(records, key=lambda record: (Version(record["python"]), DEPENDENCIES.index(record["dependencies"])))


def requirements() -> dict[str, tuple[Requirement, str]]:
    """What melayer asks for, by name: the requirement and the extra that it belongs to (empty for the core)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    del groups["dev"], groups["test"]
    found: dict[str, tuple[Requirement, str]] = {}
    for extra, lines in groups.items():
        for requirement in map(Requirement, lines):
            found.setdefault(requirement.name, (requirement, extra))
    return found


def lower_bound(requirement: Requirement) -> Version:
    """The oldest version that a requirement allows."""
    (bound,) = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
    return Version(bound)


def pythons() -> list[str]:
    """The minor versions that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"])
    return [match[1] for match in found if match]


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def wrapped(text: str) -> str:
    """A paragraph within 120 columns."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def page() -> str:
    """The page as text."""
    records = read_records()
    by_session = {(record["python"].rpartition(".")[0], record["dependencies"]): record for record in records}
    rows: list[tuple[str, ...]] = []
    parts: dict[str, int] = {}
    for python in pythons():
        for dependencies in DEPENDENCIES:
            record = by_session.get((python, dependencies))
            if record is None:
                rows.append((python, dependencies, "not run", "", "", "", "", ""))
                continue
            ran = "all"
            if record["selection"]:
                command = shlex.join(record["selection"])
                ran = f"part {parts.setdefault(command, len(parts) + 1)}"
            counts = tuple(f"{record[key]:,}" for key in ("passed", "failed", "skipped"))
            rows.append((record["python"], dependencies, ran, *counts, record["machine"], record["date"]))
    head = ("Python", "dependencies", "tests", "passed", "failed", "skipped", "on", "day")
    packages = []
    for name, (_, extra) in requirements().items():
        seen = sorted(Version(record["packages"][name]).public for record in records if name in record["packages"])
        seen.sort(key=Version)
        label = f"{name} (`melayer[{extra}]`)" if extra else name
        packages.append((label, *((seen[0], seen[-1]) if seen else ("not run", "not run"))))
    failed: dict[str, list[str]] = {}
    for record in records:
        for name in record["failures"]:
            failed.setdefault(name, []).append(f"{record['python']} {record['dependencies']}")
    failures = [(f"`{name}`", ", ".join(sessions)) for name, sessions in sorted(failed.items())]
    # A record may hold a note, added by hand: what is known about a failure.
    notes = dict.fromkeys(record["note"] for record in records if "note" in record)
    return "\n".join(
        [
            HEAD,
            table(head, rows),
            *(wrapped(f"Part {number} is what `nox -- {command}` runs.") for command, number in parts.items()),
            *([table(("test that failed", "with"), failures)] if failures else []),
            *map(wrapped, notes),
            "The oldest and the newest version of each package in these runs:\n",
            table(("package", "oldest", "newest"), packages),
            NOTES,
        ]
    )


def main(*arguments: str) -> int:
    """Write the page or check it; the exit code."""
    made = page()
    if "--check" in arguments:
        return int(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
