"""What `melayer scan` takes of memory where a corpus has long lines or many categories: the peak of each run.

    python benchmarks/scan_memory.py [--model demo] [--documents 600] [--json]

Each scan is a process of its own, as typed. The corpora are made: short documents under 10 and under 300 categories,
and one document of 4.8 MB on a line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("the", "sky", "is", "clear", "today", "and", "my", "favorite", "color", "of", "all", "is", "a", "dark", "blue")
LONG_BYTES = 4_800_000


def sentence(seed: int, n_words: int) -> str:
    """So many words, drawn."""
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def peak_bytes(arguments: list[str]) -> int:
    """The largest resident set of `melayer scan` with these arguments."""
    process = subprocess.Popen([sys.executable, "-m", "melayer", "scan", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"melayer scan {' '.join(arguments)} failed.")
    return usage.ru_maxrss * 1024


def main() -> None:
    """Makes the corpora, runs the scans and prints their peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for count in (10, 300):
            rows = [{"text": sentence(at, 24), "id": f"id {at % count}"} for at in range(options.documents)]
            (place / f"{count}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        long = (sentence(0, LONG_BYTES // 4))[:LONG_BYTES]
        (place / "long.jsonl").write_text(json.dumps({"text": long}) + "\n")
        (place / "short.jsonl").write_text(json.dumps({"text": sentence(0, 600)}) + "\n")
        runs = {
            "10 categories": ["10.jsonl", "--category", "id"],
            "300 categories, the first 64 apart": ["300.jsonl", "--category", "id"],
            "300 categories, all apart": ["300.jsonl", "--category", "id", "--max-categories", "300"],
            "a line of 600 words, --truncate": ["short.jsonl", "--truncate"],
            "a line of 4.8 MB, --truncate": ["long.jsonl", "--truncate"],
        }
        peaks = {
            name: peak_bytes([options.model, "--data", str(place / data), *more])
            for name, (data, *more) in runs.items()
        }
    if options.json:
        print(json.dumps([{"run": name, "peak_rss_bytes": peak} for name, peak in peaks.items()], indent=1))
        return
    for name, peak in peaks.items():
        print(f"{name:40s} {peak / 2**20:8,.0f} MiB")


if __name__ == "__main__":
    main()
