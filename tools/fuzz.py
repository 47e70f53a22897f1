"""Bytes of any kind as the files that melayer reads: each ends in what was read or in an error of ours.

    python tools/fuzz.py --seconds 60                  # all targets, one after another, 12 seconds each
    python tools/fuzz.py --seconds 3600 --jobs 2 --keep    # an hour, and what was found goes into the corpus

atheris makes the bytes, led by the branches of melayer that they reach. The corpus lies in `tests/fuzz_corpus`, a
directory for each target; `tests/test_fuzz.py` gives every file in it to its target. Whatever else is raised, hangs for
two minutes or takes over 2 GB ends the run with exit code 1, and the bytes are kept in `build/fuzz`.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS, FOUND = ROOT / "tests" / "fuzz_corpus", ROOT / "build" / "fuzz"
LONGEST = 4096
"""Bytes of an input: each format says all that can be wrong with it in fewer."""
MEMORY_MB, HANGS_SECONDS = 2048, 120


def read_mask(content: bytes, place: Path) -> None:
    """A mask that lies in a directory."""
    from melayer.interventions.mask import WeMask

    (place / "melayer_mask.json").write_bytes(content)
    WeMask.load(place)


def read_state(content: bytes, place: Path) -> None:
    """What a scan has kept, whatever its settings."""
    from melayer.census import state

    state.path_of(place, 0).write_bytes(content)
    state.read(place, SETTINGS)  # type: ignore[arg-type]


def read_about(content: bytes, place: Path) -> None:
    """What a scan's state says of itself, in a file that is whole otherwise: its checksums let nothing else through."""
    import io

    import numpy as np

    from melayer.census import state

    file = io.BytesIO()
    np.savez(file, about=np.frombuffer(content, np.uint8))
    state.path_of(place, 0).write_bytes(file.getvalue())
    state.read(place, SETTINGS)  # type: ignore[arg-type]


def read_index(content: bytes, place: Path) -> None:
    """The index of a checkpoint's shards."""
    from melayer.loading.files import INDEX, names_by_shard

    (place / INDEX).write_bytes(content)
    names_by_shard(place / INDEX)


def read_gguf(content: bytes, place: Path) -> None:
    """The header of a GGUF file."""
    from melayer.loading.gguf import check_gguf

    (place / "model.gguf").write_bytes(content)
    check_gguf(place / "model.gguf")


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "mask": read_mask,
    "state": read_state,
    "about": read_about,
    "index": read_index,
    "gguf": read_gguf,
}
SETTINGS = {
    "model": "0", "data": {}, "sites": ["block_out"], "max_tokens": 8, "truncate": False, "bos": None, "limit": None,
    "criterion": {}, "formats": [], "mask": None, "reading": 2,
}  # fmt: skip


def read(target: str, content: bytes, place: Path) -> bool:
    """Whether the bytes hold what the target reads; raises what is no error of ours."""
    from melayer.errors import MelayerError

    try:
        TARGETS[target](content, place)
    except MelayerError:
        return False
    return True


def fuzz(target: str, place: Path, flags: list[str]) -> None:
    """Runs libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["melayer"]):
        read(target, b"", place)  # imports what it needs, with its branches counted
    atheris.Setup([sys.argv[0], *flags], lambda content: read(target, content, place))
    atheris.Fuzz()


def run(target: str, seconds: int, keep: bool) -> int:
    """Fuzzes a target in a process of its own; its exit code."""
    kept, found = CORPUS / target, FOUND / target
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        place, grown = Path(temporary, "place"), Path(temporary, "grown")
        place.mkdir()
        grown.mkdir()
        flags = [
            f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-rss_limit_mb={MEMORY_MB}",
            f"-timeout={HANGS_SECONDS}", f"-artifact_prefix={found}/", "-print_final_stats=1", str(grown), str(kept),
        ]  # fmt: skip
        command = [sys.executable, __file__, "--target", target, "--place", str(place), "--", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        runs = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"{target}: {runs[-1].split()[-1] if runs else 'no'} inputs, exit code {done.returncode}")
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
        elif keep:
            _merge(target, place, grown, kept)
        return done.returncode


def _merge(target: str, place: Path, grown: Path, kept: Path) -> None:
    """Leaves in the corpus the fewest inputs that reach all that was reached."""
    merged = grown.with_name("merged")
    merged.mkdir()
    command = [sys.executable, __file__, "--target", target, "--place", str(place), "--"]
    subprocess.run([*command, "-merge=1", str(merged), str(kept), str(grown)], check=True, capture_output=True)
    seeds = {file.name for file in kept.iterdir() if not _is_hash(file.name)}
    for file in kept.iterdir():
        if file.name not in seeds:
            file.unlink()
    known = {file.read_bytes() for file in kept.iterdir()}
    for file in merged.iterdir():
        if file.read_bytes() not in known:
            shutil.copy(file, kept / file.name)


def _is_hash(name: str) -> bool:
    """libFuzzer names what it finds by its sha1; seeds have names of their own."""
    return len(name) == 40 and set(name) <= set("0123456789abcdef")


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together, one after another")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--keep", action="store_true", help="add what was found to the corpus")
    parser.add_argument("--target", choices=[*TARGETS], help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.target:
        with contextlib.redirect_stdout(sys.stderr):
            fuzz(given.target, given.place, given.flags)
    each = max(1, given.seconds * given.jobs // len(TARGETS))
    with ThreadPoolExecutor(given.jobs) as pool:
        return max(pool.map(lambda target: run(target, each, given.keep), TARGETS))


if __name__ == "__main__":
    sys.exit(main())
