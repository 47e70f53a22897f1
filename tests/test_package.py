"""What the contracts on imports (`lint-imports`, in `make lint`) cannot say: one place for hooks, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import melayer

SOURCE = Path(melayer.__file__).parent
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
