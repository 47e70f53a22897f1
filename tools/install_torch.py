"""Install torch, and on a machine without a GPU never the gigabytes of CUDA libraries that come with some builds.

    python tools/install_torch.py torch==2.13.0

pip is first asked what it would install. If that includes CUDA packages and there is no NVIDIA GPU here, nothing is
installed and the way to a CPU build is said. An installed torch that satisfies the requirement is left as it is.
"""

import json
import shutil
import subprocess
import sys


def would_install(requirement: str) -> list[str]:
    """The names of the packages that pip would install for a requirement."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]


def main(requirement: str) -> int:
    """Install the requirement; the exit code."""
    cuda = [name for name in would_install(requirement) if name.startswith(("nvidia-", "cuda-"))]
    if cuda and shutil.which("nvidia-smi") is None:
        sys.stderr.write(
            f"This machine has no NVIDIA GPU, but `pip install {requirement}` would bring {len(cuda)} CUDA packages "
            f"({cuda[0]}, …).\nInstall a CPU build of torch into this environment first, with the command that "
            'pytorch.org\'s "Get started" page gives for Pip and CPU, then run make again:\n'
            f"    {sys.executable} -m pip install torch … (the command from that page)\n"
        )
        return 1
    # Compiling all of torch to bytecode takes longer than compiling the modules that are imported, when they are.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", requirement]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
