"""The tests with the oldest and the newest dependencies, on every Python that melayer supports: `make test-matrix`.

Each session makes an environment of its own with uv, runs the tests in it, and leaves what it saw in
`results/versions/`, of which `tools/versions_page.py` makes `docs/versions.md`. A Python that this machine lacks is
skipped, and said.

    nox --list                                           # the sessions
    nox --session "tests-3.12(newest)"                   # one of them
    nox --session "tests-3.12(newest)" -- tests/test_locate.py    # a part of the tests; the record says which

torch is the build that uv's settings lead to: by default PyPI's, on Linux with gigabytes of CUDA libraries.
`UV_TORCH_BACKEND=cpu` takes the small one from PyTorch's own index.
"""

import os
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "uv"

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]  # as the classifiers in pyproject.toml
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
# What is oldest depends on the Python: of these, the oldest release that has a wheel for it.
COMPILED = ["numpy", "pyyaml", "safetensors", "scipy", "statsmodels", "torch"]
DEMO = "tools/demo-requirements.txt"
RECORDS = Path("results", "versions")
# Named beside the package too: uv takes what a package's extra asks of another of its extras for no direct dependency.
EXTRAS = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
DIRECT = [requirement for name in ("eval", "tune") for requirement in EXTRAS[name]]

# pyenv's commands answer only for versions that are switched on: all that are installed.
pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
os.environ.setdefault("PYENV_VERSION", ":".join(sorted(path.name for path in pyenv.glob("3.*"))))


@nox.session(python=PYTHONS)
@nox.parametrize("dependencies", [nox.param(name, id=name) for name in RESOLUTIONS])
def tests(session: nox.Session, dependencies: str) -> None:
    """The tests, and a record of the versions and of what passed; fails where a test failed."""
    wheels = [f"--only-binary={name}" for name in COMPILED]
    session.install(f"--resolution={RESOLUTIONS[dependencies]}", *wheels, ".[test]", *DIRECT)
    session.install("--no-deps", "--requirement", DEMO)
    junit = Path(session.create_tmp(), "junit.xml")
    junit.unlink(missing_ok=True)
    session.run(
        "python", "-m", "pytest", "-n", "auto", "-m", "not records", f"--junitxml={junit}", *session.posargs,
        env={"OMP_NUM_THREADS": "1"}, success_codes=[0, 1],
    )  # fmt: skip
    record = RECORDS / f"{session.python}-{dependencies}.json"
    session.run("python", "tools/record_versions.py", str(junit), str(record), dependencies, *session.posargs)
