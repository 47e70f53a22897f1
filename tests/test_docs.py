"""The README's code runs, prints what it says, and its figures come from the command it names."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import melayer
from melayer.measurements.locate.table import show_locate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.demo
def test_the_python_example_prints_what_its_comments_say(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert len(promised) == 7
    assert lines[1:] == promised
    assert (tmp_path / "demo-report" / "report.html").exists()


@pytest.mark.demo
def test_the_output_shown_is_the_output(demo):
    from rich.console import Console

    file = io.StringIO()
    show_locate(melayer.locate(demo.model, demo.tokenizer, name="demo"), Console(file=file, width=80))
    actual = [line.rstrip() for line in file.getvalue().splitlines()]
    (shown,) = blocks("text")
    for line in shown.splitlines():
        assert line == "…" or line in actual, line


def test_every_public_name_and_command_is_documented():
    documents = README + "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for name in (
        "load",
        "locate",
        "locate_frugal",
        "explain",
        "rigidity",
        "sinks",
        "answers",
        "fixed_prefix",
        "WeMask",
        "perplexity",
        "sweep",
        "write_report",
        "evaluate",
        "load_tasks",
        "sft",
        "dpo",
        "grpo",
        "measure",
        "contrast",
        "scan",
        "quant_check",
    ):
        assert f"melayer.{name}(" in documents
    for name in ("SetMassive", "FlatGamma", "CapWrite", "RemoveNeurons"):
        assert f"`{name}" in documents
    for command in (
        "locate", "explain", "rigidity", "sinks", "report", "generate", "sweep", "eval", "compare", "tune", "contrast",
        "scan", "quant-check",
    ):  # fmt: skip
        assert f"melayer {command} " in documents


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), (path.name, target)
