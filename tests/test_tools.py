"""The Makefile's way to torch: no CUDA packages on a machine without a GPU."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "install_torch.py"


@pytest.fixture
def install_torch():
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("packages", "gpu", "installs"),
    [
        (["torch", "sympy"], False, True),
        (["torch", "nvidia-cublas", "sympy"], False, False),
        (["torch", "cuda-toolkit"], False, False),
        (["torch", "nvidia-cublas"], True, True),
        ([], False, True),
    ],
)
def test_cuda_packages_only_where_there_is_a_gpu(install_torch, monkeypatch, capsys, packages, gpu, installs):
    ran = []
    monkeypatch.setattr(install_torch, "would_install", lambda requirement: packages)
    monkeypatch.setattr(install_torch.shutil, "which", lambda name: "/bin/nvidia-smi" if gpu else None)
    monkeypatch.setattr(
        install_torch.subprocess,
        "run",
        lambda command, check: (ran.append(command), type("Done", (), {"returncode": 0}))[1],
    )
    assert install_torch.main("torch==2.13.0") == (0 if installs else 1)
    assert bool(ran) == installs
    assert ("Install a CPU build of torch" in capsys.readouterr().err) == (not installs)
