"""Runs commands of Python for `same_results.py`, each in a process of its own that has the libraries loaded already.

Loading torch and transformers takes most of the time of a measurement on a toy, so that is done once, and each command
is a fork of this process. melayer itself is not loaded before: each command loads it as a new interpreter would.

On stdin comes a line of JSON for each command: `arguments` (what follows `-m melayer`), `stdout` and `stderr` (files).
The exit code goes to stdout.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    *("torch", "numpy", "safetensors.torch", "tokenizers", "typer", "rich.console", "jinja2", "gguf", "peft"),
    *(
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gemma2", "gpt2", "gpt_neox", "gpt_oss")),
    "transformers.models.qwen3_next.modeling_qwen3_next",
)


def main() -> int:
    """Answers until stdin ends."""
    sys.path[0] = str(Path.cwd())  # as `python -m` has it
    for name in LIBRARIES:
        importlib.import_module(name)
    if "melayer" in sys.modules:
        sys.exit("A library has loaded melayer, which is to be loaded by each command.")
    gc.freeze()  # so that no child copies it all to look for garbage in it
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if (child := os.fork()) == 0:
            code = _command(asked["arguments"], asked["stdout"], asked["stderr"])
            # All that an interpreter does at its end, save for taking the libraries apart, which takes a second.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return 0


def _command(arguments: list[str], stdout: str, stderr: str) -> int:
    """Runs melayer with these arguments, as `python -m melayer` does; the exit code."""
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        opened = os.open(path, flags | (os.O_CREAT | os.O_TRUNC if descriptor else 0), 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["melayer", *arguments]
    try:
        runpy.run_module("melayer", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 - what an interpreter does with what nobody has caught
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
