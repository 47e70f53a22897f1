"""What the contracts on imports (`lint-imports`, in `make lint`) cannot say: one place for hooks, light imports."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import melayer
from melayer import cli

SOURCE = Path(melayer.__file__).parent
ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SOURCES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def importing(*packages: str) -> set[str]:
    """The modules that import one of the packages, at the top or inside a function."""
    found = set()
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(module.split(".")[0] in packages for module in modules):
                found.add(name)
    return found


def test_hooks_are_registered_in_one_module():
    registering = {name for name, source in SOURCES.items() if "register_" in source and "hook" in source}
    assert registering == {"model/hooks.py"}


def test_pages_are_made_in_one_package():
    assert {name.split("/")[0] for name in importing("plotly", "jinja2")} == {"presentation"}


def test_terminals_are_known_to_the_command_line_progress_and_tables():
    for name in importing("rich", "typer"):
        assert name.startswith("cli/") or name == "runs/progress.py" or name.endswith(("/table.py", "/tables.py")), name


def test_chat_templates_run_in_one_module():
    """They are programs, which run within limits there; what lm-eval calls leads there, too."""
    calling = {name for name, source in SOURCES.items() if ".apply_chat_template(" in source}
    assert calling == {"data/chat.py"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(n for n in ('torch', 'transformers', 'plotly') if n in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_neither_torch_nor_plotting():
    assert loaded_by("import melayer, melayer.cli") == set()


def test_the_light_import_check_can_fail():
    assert "torch" in loaded_by("import melayer; melayer.locate")


def test_public_names_are_there():
    assert sorted(dir(melayer)) == sorted(melayer.__all__)
    for name in melayer.__all__:
        assert name == "__version__" or callable(getattr(melayer, name)), name
    with pytest.raises(AttributeError, match="nothing"):
        _ = melayer.nothing


def test_no_package_has_a_public_name():
    # Importing a package of the same name would put it in the function's place.
    packages = {path.stem for path in SOURCE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not packages & set(melayer.__all__)


MEASUREMENTS = sorted(path.parent.name for path in (SOURCE / "measurements").glob("*/__init__.py"))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_is_one_folder_and_three_shared_places(name):
    """What CONTRIBUTING.md asks of one, for every folder that there is."""
    package = f"melayer.measurements.{name}"
    verb = importlib.import_module(f"{package}.{name}")
    result = importlib.import_module(f"{package}.result")
    public = {public for public in melayer.__all__ if getattr(melayer, public) in vars(result).values()}
    assert getattr(melayer, name) is getattr(verb, name)
    assert callable(getattr(verb, f"{name}_on"))
    assert any(hasattr(getattr(melayer, found), "to_dict") for found in public), "no public result"
    assert callable(importlib.import_module(f"{package}.report").section)
    assert callable(getattr(importlib.import_module(f"{package}.table"), f"show_{name}"))
    assert importlib.import_module(package).__doc__
    commands = typer.main.get_command(cli.app).commands
    assert name in commands
    assert (ROOT / "docs" / f"{name}.md").exists()
    assert f"`melayer {name} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_layers_drawn_are_the_layers_held():
    (contract,) = [of for of in tomllib.loads(PYPROJECT)["tool"]["importlinter"]["contracts"] if of["type"] == "layers"]
    drawn = re.search(r"```text\n(cli\n.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    layers = [re.split(r" {2,}", line)[0] for line in drawn.splitlines()]
    assert layers == [layer.strip("()") for layer in contract["layers"]]
    assert not any("ignore_imports" in of for of in tomllib.loads(PYPROJECT)["tool"]["importlinter"]["contracts"])
