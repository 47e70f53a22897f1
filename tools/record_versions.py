"""Write down which versions one run of the tests had, and what came of it; the exit code is 1 where a test failed.

    python tools/record_versions.py junit.xml results/versions/3.12-newest.json newest [pytest's arguments …]

Run it with the Python of the environment that ran the tests.
"""

import importlib.metadata
import json
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import torch

# What development alone needs decides nothing about what melayer runs with.
LEFT_OUT = ("dev", "test")


def versions() -> dict[str, str]:
    """The installed version of each package that melayer, `melayer[eval]` and `melayer[tune]` ask for."""
    found = {}
    for requirement in importlib.metadata.requires("melayer") or []:
        specification, _, marker = requirement.partition(";")
        name = re.match(r"[\w.-]+", specification)
        if name and not any(f'"{extra}"' in marker.replace("'", '"') for extra in LEFT_OUT):
            found[name[0]] = importlib.metadata.version(name[0])
    return found


def outcomes(junit: Path) -> dict[str, object]:
    """How many tests passed, failed and were skipped by pytest's report; which failed; how long it took."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": sorted(failures), "seconds": round(float(suite.get("time", "nan")))}


def main(junit: str, out: str, dependencies: str, *arguments: str) -> int:
    """Write the record; the exit code."""
    outcome = outcomes(Path(junit))
    record = {
        "python": platform.python_version(),
        "dependencies": dependencies,
        "machine": f"{platform.system()} {platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
        "date": datetime.now(UTC).date().isoformat(),
        "selection": list(arguments),
        **outcome,
        "packages": versions(),
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if outcome["failed"] or not outcome["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
