"""A chat template run in a process of its own: its exit code says whether the template came to an end.

`python -m melayer.data.template_trial SECONDS MEGABYTES CHARACTERS` reads what is to be rendered from stdin, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

ENDLESS = 3
"""The exit code where a template took too much; also a signal's, by which the system ends it."""


def main(seconds: int, megabytes: int, characters: int) -> int:
    """Renders what stdin holds, within limits."""
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = json.loads(sys.stdin.read())
    _limit(seconds, megabytes)
    try:
        rendered: Any = render_jinja_template(
            conversations=[asked["turns"]],
            chat_template=asked["template"],
            add_generation_prompt=asked["add_generation_prompt"],
            **asked["special"],
        )
    except MemoryError:
        return ENDLESS
    except Exception:  # noqa: BLE001 - whatever a template raises is said where it is used
        return 0
    texts = rendered[0] if isinstance(rendered, tuple) else rendered
    return ENDLESS if sum(map(len, texts)) > characters else 0


def _limit(seconds: int, megabytes: int) -> None:
    """So much of the processor's time and so much memory more than there is now, where the system can."""
    try:
        import resource
    except ImportError:  # Windows; the caller waits so long and no longer
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    statm = Path("/proc/self/statm")
    # Where the system does not say how large the process is, a wide guess.
    size = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 4 << 30
    resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20),) * 2)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:4])))
