"""Which files a command opens and to what it connects, beside its model, its cache and Python itself; needs strace.

    python tools/opened_files.py MODEL -- locate MODEL --text "some words" --json

Prints every other file that was opened and every connection, a line each, and ends with 1 if there is one. What the
operating system's own libraries open (locales, the dynamic linker's cache, `/proc`, `/sys`, random numbers) is listed
in SYSTEM. The command runs offline, with a home, a cache and temporary files of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import melayer

SYSTEM = (
    "/proc", "/sys", "/dev/null", "/dev/urandom", "/dev/random", "/dev/shm", "/dev/tty", "/dev/pts", "/etc/ld.so.cache",
    "/etc/ld.so.preload", "/etc/localtime", "/usr/share/zoneinfo", "/usr/lib/locale", "/usr/share/locale", "/lib",
    "/usr/lib", "/lib64", "/usr/local/lib", "/usr/local/cuda", "/etc/mime.types", "/etc/os-release", "/etc/passwd",
    "/etc/nsswitch.conf", "/etc/group", "/usr/share/terminfo", "/lib/terminfo", "/etc/terminfo", "/bin", "/usr/bin",
    "/sbin", "/usr/sbin", "/etc/ssl", "/etc/gai.conf", "/etc/inputrc", "/etc/apache2/mime.types", "/etc/httpd",
    "/etc/locale.alias",
)  # fmt: skip
"""What belongs to the operating system."""
_OPENED = re.compile(r'open(?:at)?\((?:[^,"]*, )?"((?:[^"\\]|\\.)*)".*\) = (\d+)(?:<(.*?)>)?')
_CONNECTED = re.compile(r"connect\(\d+.*?, (\{.*?\}),")


def python() -> tuple[str, ...]:
    """Where the interpreter, its libraries and the package itself lie."""
    places = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(melayer.__file__).parents[1])}
    return tuple(str(Path(place).resolve()) for place in places) + tuple(places)


def traced(command: Sequence[str], place: Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a command under strace, offline.

    Args:
        command: What is typed.
        place: An empty directory for its home, cache, temporary files and the trace.

    Returns:
        How it ended, and the lines of the trace.
    """
    trace = place / "trace"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"HOME": str(place), "TMPDIR": str(place), "MELAYER_CACHE": str(place / "cache")}
    run = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", "trace=open,openat,connect", "-o", str(trace), *command]
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env=environment, input="y\n" * 20, cwd=place
    )
    return done, trace.read_text(encoding="utf-8", errors="replace").splitlines()


def strange(lines: Sequence[str], allowed: Sequence[str]) -> Iterator[str]:
    """What was opened outside of the places allowed, and what was connected to."""
    seen = set()
    for line in lines:
        if connected := _CONNECTED.search(line):
            if "/nscd/" in connected[1]:  # where the operating system looks for the names of users
                continue
            found = f"connect {connected[1]}"
        elif (opened := _OPENED.search(line)) and not _within(opened[3] or opened[1], allowed):
            found = f"open {opened[3] or opened[1]}"
        else:
            continue
        if found not in seen:
            seen.add(found)
            yield found


def _within(path: str, allowed: Sequence[str]) -> bool:
    # A relative name without what it became is of the working directory, which the place is.
    return any(path == place or path.startswith(place.rstrip("/") + "/") for place in allowed) or path in ("/", ".")


def main() -> int:
    """Runs what the command line asks for."""
    at = sys.argv.index("--") if "--" in sys.argv else 0
    if at < 2:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        done, lines = traced([sys.executable, "-m", "melayer", *sys.argv[at + 1 :]], place)
        models = [str(Path(name).resolve()) for name in sys.argv[1:at]]
        # A link in the model's directory is where it leads only if that is in the directory too.
        found = list(strange(lines, [*models, str(place), *python(), *SYSTEM]))
    print(f"exit code {done.returncode}; {len(lines)} calls traced", file=sys.stderr)
    print(done.stderr[-1000:], file=sys.stderr, end="")
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
