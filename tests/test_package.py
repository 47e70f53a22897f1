"""The shape of the house: imports go one way, hooks live in one place, importing is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import melayer

SOURCE = Path(melayer.__file__).parent
# Each module may import only from those before it.
ORDER = (
    "version",
    "errors",
    "gguf_cache",
    "hooks",
    "architecture",
    "provenance",
    "inputs",
    "statistics",
    "locate",
    "progress",
    "histogram",
    "quantisation",
    "paired",
    "jsonl",
    "finished",
    "processes",
    "tasks",
    "answering",
    "answer_store",
    "evaluate",
    "positions",
    "masking",
    "mask",
    "adapters",
    "shards",
    "hub",
    "models",
    "frugal",
    "answers",
    "attention",
    "reduction",
    "observe",
    "reconstruction",
    "corpus",
    "census",
    "scan_state",
    "scan_result",
    "scan",
    "sinks",
    "rigidity",
    "perplexity",
    "linear_inputs",
    "baked_prefix",
    "calibration",
    "rounding",
    "quant_check_result",
    "quant_check",
    "sweep",
    "counterfactuals",
    "neurons",
    "causes",
    "explain",
    "comparators",
    "rewards",
    "training_rows",
    "training_data",
    "training_config",
    "checkpoints",
    "trainers",
    "run_directory",
    "lending",
    "training",
    "contrast",
    "report.sections",
    "report.locate",
    "report.rigidity",
    "report.sinks",
    "report.sweep",
    "report.quant_check",
    "report.explain",
    "report.evaluate",
    "report.scan",
    "report.tune",
    "report.contrast",
    "report.page",
    "report",
    "tune",
    "terminal.tables",
    "terminal.answers",
    "terminal.locate",
    "terminal.rigidity",
    "terminal.sinks",
    "terminal.sweep",
    "terminal.quant_check",
    "terminal.explain",
    "terminal.evaluate",
    "terminal.scan",
    "terminal.tune",
    "terminal.contrast",
    "terminal",
    "cli.options",
    "cli.session",
    "cli.evaluation",
    "cli.scanning",
    "cli.tuning",
    "cli.quantising",
    "cli",
    "__main__",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("melayer.") for name in found if name.startswith("melayer.")} & set(ORDER)


def backward(name: str, source: str) -> set[str]:
    return {other for other in imports(source) if ORDER.index(other) >= ORDER.index(name)}


SOURCES = {
    module_name(path): path.read_text()
    for path in SOURCE.rglob("*.py")
    if path.parent != SOURCE or path.stem != "__init__"
}


def test_every_module_has_its_place():
    assert set(SOURCES) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    assert not backward(name, SOURCES[name])


def test_the_import_check_can_fail():
    assert backward("hooks", "from melayer import locate") == {"locate"}
    assert backward("hooks", "import melayer.cli") == {"cli"}


def test_hooks_are_registered_in_one_module():
    registering = {name for name, source in SOURCES.items() if "register_" in source and "hook" in source}
    assert registering == {"hooks"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(n for n in ('torch', 'transformers', 'plotly') if n in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_neither_torch_nor_plotting():
    assert loaded_by("import melayer, melayer.cli") == set()


def test_the_light_import_check_can_fail():
    assert "torch" in loaded_by("import melayer; melayer.locate")


def test_public_names_are_there_and_stay_functions():
    # Importing the module of the same name must not replace the function.
    code = (
        "from melayer.locate import Criterion; import melayer, melayer.locate\n"
        "assert all(callable(getattr(melayer, n)) for n in melayer.__all__ if n != '__version__')\n"
        "assert all(hasattr(melayer, name) for name in melayer.__all__)\n"
        "assert set(dir(melayer)) == set(melayer.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = melayer.nothing
