"""Show that two source trees give the same results, or where they do not.

    python tools/same_results.py record OLD/src before --toys toys
    python tools/same_results.py record src after --toys toys
    python tools/same_results.py compare before after

`record` runs each case of `same_results_cases.py` (every command on the demo model and on toys of several families,
many options, bad input, all help texts, the public names) with that tree in front on PYTHONPATH. It keeps what the
commands print, their exit codes and the files they write. The toys are made in --toys where they are missing, and both
recordings have to use the same. `--only NAME` (repeatable, with * and ?) takes some cases, `--jobs` runs several at
once (each on one thread, so that figures do not depend on it); cases that are recorded again replace the older ones.

`compare` prints a line for each case and ends with exit code 1 if anything differs. Compared are exit codes, stdout,
stderr and written files: JSON value by value and in its order, tensors element by element, other text line by line.
Left out are versions, dates, durations and absolute paths, and the inside of `scan.*.state`, which has a duration in it
(its figures are in the JSON). Numbers must be equal to the last bit; for recordings of two machines give --rtol and
--atol.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import same_results_toys
import same_results_worker
from same_results_cases import OUT, Case, all_cases

ABOUT = "recording.json"
"""What a recording is of."""
CASE = "case.json"
"""A case's commands, exit codes and seconds."""

LEFT_OUT = {"melayer_version", "versions", "date", "seconds"}
"""Keys of JSON whose values are not compared."""
SHOWN = 8
"""Differences that are printed of each case."""

_NORMALISED = (
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|[+-]\d\d:\d\d)?"), "<date>"),
    (re.compile(r"\b(melayer|torch|transformers|python) \d+\.\d+[\w.+]*"), r"\1 <version>"),
    (re.compile(r"[\d,.]+ s in (\d+ process)"), r"<seconds> s in \1"),
    (re.compile(r"/tmp/tmp\w+"), "<temporary>"),
)
_FIGURES = re.compile(r'<script type="application/json" id="figures">(.*)</script>')
_NUMBER = re.compile(r"([-+−]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?)")


# --- record -------------------------------------------------------------------------------------------------------


def record(source: Path, out: Path, toys: Path, only: list[str], jobs: int) -> int:
    """Runs the cases against one tree and keeps what they give; the exit code."""
    cases = [case for case in all_cases() if wanted(case.name, only)]
    if not cases:
        sys.exit(f"No case is called {', '.join(only)}.")
    out.mkdir(parents=True, exist_ok=True)
    same_results_toys.provide(toys, source)
    link = out / "toys"
    link.unlink(missing_ok=True)
    link.symlink_to(toys, target_is_directory=True)
    environment = environment_for(source, out)
    check_tree(source, environment, out)
    about = {
        "source": str(source),
        "out": str(out),
        "toys": str(toys),
        "toys_sha256": digest(toys),
        "machine": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "python": platform.python_version(),
    }
    (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    began = time.monotonic()
    runner = Runner(out, environment)
    with contextlib.closing(runner), ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(runner.run, cases):
            say(line)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    say(
        f"{len(cases)} cases in {time.monotonic() - began:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of processor time with loading"
    )
    return 0


def environment_for(source: Path, out: Path) -> dict[str, str]:
    """One thread, no GPU, no network, no terminal, and nothing that an older conversion has left."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FORCE_COLOR")
    }
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    shown = {"COLUMNS": "120", "TERMINAL_WIDTH": "120", "TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    places = {
        "PYTHONPATH": str(source),
        "MELAYER_CACHE": str(out / "cache"),
        "HF_DATASETS_CACHE": str(out / "datasets"),
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **threads, **shown, **places, **offline, "PYTHONDONTWRITEBYTECODE": "1"}


def check_tree(source: Path, environment: dict[str, str], out: Path) -> None:
    """Ends the program where another melayer than this tree's would be imported."""
    command = [sys.executable, "-c", "import melayer; print(melayer.__file__)"]
    done = subprocess.run(command, cwd=out, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    if not Path(done.stdout.strip()).resolve().is_relative_to(source):
        sys.exit(f"{source} was given, but melayer comes from {done.stdout.strip()}. Give the directory that holds it.")


class Runner:
    """Runs cases against one tree, and keeps what they give.

    Those that need no interpreter of their own are forks of a worker; `jobs` threads have one each.
    """

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        """Starts no worker before it is needed."""
        self.out = out
        self.environment = environment
        self._own = threading.local()
        self._workers: list[subprocess.Popen[str]] = []

    def run(self, case: Case) -> str:
        """Runs one case's commands; a line that says how it went."""
        place = self.out / "cases" / case.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        began, codes = time.monotonic(), []
        for number, command in enumerate(case.commands):
            # Relative, so that the same is said in every recording, wrapped in the same places.
            arguments = [f"cases/{case.name}/out" if argument == OUT else argument for argument in command]
            said = place / f"{number}.stdout", place / f"{number}.stderr"
            codes.append(self._fresh(arguments, *said) if case.fresh else self._forked(arguments, *said))
        seconds = time.monotonic() - began
        values = {"commands": case.commands, "exit_codes": codes, "seconds": round(seconds, 2)}
        (place / CASE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return f"{case.name}: exit {', '.join(map(str, codes))} after {seconds:.1f} s"

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.communicate()

    def _fresh(self, arguments: list[str], stdout: Path, stderr: Path) -> int:
        with stdout.open("wb") as out, stderr.open("wb") as err:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=self.out,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                check=False,
            )
        return done.returncode

    def _forked(self, arguments: list[str], stdout: Path, stderr: Path) -> int:
        if not hasattr(self._own, "worker"):
            self._own.worker = subprocess.Popen(
                [sys.executable, same_results_worker.__file__],
                cwd=self.out,
                # tqdm reads it when it is imported, which melayer has no chance to be ahead of here.
                env={**self.environment, "TQDM_DISABLE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._workers.append(self._own.worker)
        if arguments[:2] != ["-m", "melayer"]:
            raise ValueError(f"{arguments} needs an interpreter of its own")
        worker = self._own.worker
        worker.stdin.write(
            json.dumps({"arguments": arguments[2:], "stdout": str(stdout), "stderr": str(stderr)}) + "\n"
        )
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            sys.exit("The worker has died.")
        return int(answer)


def digest(directory: Path) -> str:
    """Hash of all files below a directory and of their names."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(directory)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


# --- compare ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may be apart: `|a - b| <= max(rtol * max(|a|, |b|), atol)`."""

    rtol: float
    atol: float

    def same(self, a: Any, b: Any) -> bool:
        """Whether two values of JSON are the same; numbers within texts count as numbers where there is tolerance."""
        if type(a) is type(b) and a == b:
            return True
        if not self.rtol and not self.atol:
            return False
        if isinstance(a, str) and isinstance(b, str):
            return self._same_text(a, b)
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
        return numbers and math.isclose(a, b, rel_tol=self.rtol, abs_tol=self.atol)

    def _same_text(self, a: str, b: str) -> bool:
        parts = _NUMBER.split(a), _NUMBER.split(b)
        if len(parts[0]) != len(parts[1]):
            return False
        for place, (one, other) in enumerate(zip(*parts, strict=True)):
            if one == other:
                continue
            if place % 2 == 0 or not self.same(_number(one), _number(other)):
                return False
        return True


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def compare(first: Path, second: Path, only: list[str], tolerance: Tolerance) -> int:
    """Prints where two recordings differ; the exit code."""
    abouts = [json.loads((place / ABOUT).read_text(encoding="utf-8")) for place in (first, second)]
    if abouts[0]["toys_sha256"] != abouts[1]["toys_sha256"]:
        sys.exit("The two were recorded with different toys. Give both the same --toys.")
    roots = [[(about[key], f"<{key}>") for key in ("source", "out", "toys")] for about in abouts]
    names = {path.parent.name for place in (first, second) for path in place.glob(f"cases/*/{CASE}")}
    names = {name for name in names if wanted(name, only)}
    if not names:
        sys.exit("There are no cases to compare.")
    n_values, differing = 0, []
    for name in sorted(names):
        sides = [place / "cases" / name for place in (first, second)]
        if absent := [side for side in sides if not (side / CASE).exists()]:
            differences, compared = [f"there is no {absent[0]}"], 0
        else:
            found = [list(leaves(side, known)) for side, known in zip(sides, roots, strict=True)]
            differences, compared = differing_leaves(found[0], found[1], tolerance), len(found[0])
        n_values += compared
        say(f"{name}: {'differs' if differences else 'same'} ({compared} values)")
        for line in differences[:SHOWN]:
            say(f"    {line}")
        if len(differences) > SHOWN:
            say(f"    and {len(differences) - SHOWN} more")
        if differences:
            differing.append(name)
    say(f"{len(names)} cases, {n_values} values compared: {len(differing) or 'no'} case(s) differ.")
    if differing:
        say(f"Differ: {', '.join(differing)}")
    return 1 if differing else 0


def differing_leaves(first: list[tuple[str, Any]], second: list[tuple[str, Any]], tolerance: Tolerance) -> list[str]:
    """A line for each value that is not the same or only on one side."""
    a, b = dict(first), dict(second)
    found = [f"{path}: {short(a[path])} is not there any more" for path in a if path not in b]
    found += [f"{path}: {short(b[path])} was not there before" for path in b if path not in a]
    found += [
        f"{path}: {' became '.join(around_difference(a[path], b[path]))}"
        for path in a
        if path in b and not tolerance.same(a[path], b[path])
    ]
    if not found and list(a) != list(b):
        place = next(one for one, other in zip(a, b, strict=True) if one != other)
        found.append(f"{place}: the order of the keys differs from here on")
    return found


def leaves(place: Path, roots: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """Every compared value of a case, with its path."""
    about = json.loads((place / CASE).read_text(encoding="utf-8"))
    yield from json_leaves({key: about[key] for key in ("commands", "exit_codes")}, "", roots)
    for path in sorted(place.rglob("*")):
        if path.is_file() and path.name != CASE:
            yield from file_leaves(path, str(path.relative_to(place)), roots)


def file_leaves(path: Path, name: str, roots: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """The values in one file."""
    yield name, "file"
    if path.suffix == ".safetensors":
        yield from tensor_leaves(path, name, roots)
    elif path.suffix != ".state":
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            yield f"{name}#sha256", hashlib.sha256(path.read_bytes()).hexdigest()
            return
        yield from text_leaves(text, name, roots)


def _in_order(figures: str) -> str:
    return json.dumps(json.loads(figures), sort_keys=True)


def text_leaves(text: str, name: str, roots: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """JSON as values, anything else, and JSON lines among it, line by line."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        for number, line in enumerate(text.splitlines(), start=1):
            # The figures of a page: nobody reads their keys in order.
            figures = _FIGURES.fullmatch(line.strip())
            try:
                values = json.loads(line if figures is None else _in_order(figures[1]))
            except json.JSONDecodeError:
                yield f"{name}:{number}", normalised(line, roots)
            else:
                yield from json_leaves(values, f"{name}:{number} ", roots)
    else:
        yield from json_leaves(values, f"{name} ", roots)


def json_leaves(value: Any, path: str, roots: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """The values that hold no others, and empty lists and objects, with the keys that lead there."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if key not in LEFT_OUT:
                yield from json_leaves(inner, f"{path}.{key}", roots)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from json_leaves(inner, f"{path}[{index}]", roots)
    else:
        yield path, normalised(value, roots) if isinstance(value, str) else value


def tensor_leaves(path: Path, name: str, roots: list[tuple[str, str]]) -> Iterator[tuple[str, Any]]:
    """The elements of every tensor, its dtype and shape, and the file's own words."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield from json_leaves(file.metadata() or {}, f"{name} metadata", roots)
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key)
            yield f"{name} {key}", f"{tensor.dtype} {list(tensor.shape)}"
            for index, value in enumerate(tensor.flatten().tolist()):
                yield f"{name} {key}[{index}]", value


def normalised(text: str, roots: list[tuple[str, str]]) -> str:
    """The text without what differs from run to run."""
    for root, name in roots:
        text = text.replace(root, name)
    if len(text) > 100_000:  # plotly's own script, in which the patterns find many numbers
        return text
    for pattern, instead in _NORMALISED:
        text = pattern.sub(instead, text)
    return text


def around_difference(one: Any, other: Any) -> tuple[str, str]:
    """Two values as they are shown; of long texts the part in which they differ first."""
    if isinstance(one, str) and isinstance(other, str) and max(len(one), len(other)) > 100:
        begins = max(0, next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0) - 30)
        if begins:
            return f"...{short(one[begins:])}", f"...{short(other[begins:])}"
    return short(one), short(other)


def short(value: Any) -> str:
    """The value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# --- the command line ---------------------------------------------------------------------------------------------


def wanted(name: str, only: list[str]) -> bool:
    """Whether a case is asked for."""
    return not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)


def say(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Parses the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases against one source tree")
    recording.add_argument("source", type=Path, help="the directory that holds melayer")
    recording.add_argument("out", type=Path, help="where to keep what they give")
    recording.add_argument("--toys", type=Path, required=True, help="the toys' directory, made if missing")
    recording.add_argument("--only", action="append", default=[], metavar="NAME", help="only these cases")
    recording.add_argument("--jobs", type=int, default=1, help="cases at once")
    comparing = commands.add_parser("compare", help="hold one recording to another")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--only", action="append", default=[], metavar="NAME", help="only these cases")
    comparing.add_argument("--rtol", type=float, default=0.0, help="relative tolerance of numbers; default: equal")
    comparing.add_argument("--atol", type=float, default=0.0, help="absolute tolerance of numbers; default: equal")
    given = parser.parse_args()
    if given.command == "record":
        source, out, toys = (place.resolve() for place in (given.source, given.out, given.toys))
        return record(source, out, toys, given.only, given.jobs)
    return compare(given.first, given.second, given.only, Tolerance(given.rtol, given.atol))


if __name__ == "__main__":
    sys.exit(main())
