"""What goes into the source distribution, and what is said of the package in more than one place."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import melayer
from melayer.loading import demo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = [
    classifier.rpartition(" ")[2]
    for classifier in PROJECT["project"]["classifiers"]
    if classifier.startswith("Programming Language :: Python :: 3.")
]


def test_the_source_distribution_holds_every_file_of_the_repository(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("This is no checkout of the repository.")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    for name in tracked:  # elsewhere, since building leaves files behind
        copy = tmp_path / "melayer" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('.')"],
        cwd=tmp_path / "melayer",
        capture_output=True,
        check=True,
    )
    (archive,) = (tmp_path / "melayer").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    assert tracked - held == set()
    made = {name for name in held - tracked if not name.startswith("src/melayer.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_every_place_names_the_same_pythons():
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + PYTHONS[0].replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert f"# Python {PYTHONS[0]} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    sessions = re.search(r"^PYTHONS = (\[.*?\])", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert ast.literal_eval(sessions[1]) == PYTHONS


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == melayer.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["project"]["authors"]
    ]


def test_the_demo_model_is_the_one_that_the_package_names():
    lines = (ROOT / "tools" / "demo-requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [demo.DEMO_PACKAGE]
