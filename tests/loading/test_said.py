"""Whether code that came with something may run is said at every call that could run it, by the source itself."""

import ast
import inspect
from pathlib import Path

import pytest
from datasets import load_dataset
from peft import PeftConfig, PeftModel

import melayer

SOURCES = sorted(Path(melayer.__file__).parent.rglob("*.py"))
LOADING = {
    "from_pretrained",
    "from_config",
    "pipeline",
    "load_dataset",
    "load_dataset_builder",
    "get_class_from_dynamic_module",
}
"""What loads a config, a model, a tokenizer, a processor, data or a class, in transformers and datasets."""
HARNESSES = {"HFLM", "VLLM", "AutoPeftModel", "AutoPeftModelForCausalLM"}
"""Classes that load by a name when they are made."""
NO_CODE = {"PeftConfig", "PeftModel"}
"""Whose `from_pretrained` reads JSON and tensors, and knows no code; a test below holds them to it."""


def calls(source):
    """The calls in a source that could run code that came along, with the name of what each is a method of."""
    tree = ast.parse(source)
    subclasses = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if {ast.unparse(b) for b in node.bases} & HARNESSES
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in LOADING | HARNESSES | subclasses and owner not in NO_CODE:
            yield node


def unsaid(source):
    """The lines of the calls that leave it open, or ask."""
    found = []
    for node in calls(source):
        said = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        if not said or any(isinstance(value, ast.Constant) and not isinstance(value.value, bool) for value in said):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_every_call_says_it(path):
    assert unsaid(path.read_text(encoding="utf-8")) == []


def test_there_are_such_calls():
    found = [node for path in SOURCES for node in calls(path.read_text(encoding="utf-8"))]
    assert {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"} <= {
        ast.unparse(node.func.value) for node in found if isinstance(node.func, ast.Attribute)
    }
    assert {"Quiet", "load_dataset"} <= {ast.unparse(node.func).rpartition(".")[2] for node in found}


@pytest.mark.parametrize(
    "source",
    [
        "AutoTokenizer.from_pretrained(place)",
        "AutoTokenizer.from_pretrained(place, **options)",
        "AutoTokenizer.from_pretrained(place, trust_remote_code=None)",
        "model_class.from_config(config, dtype=dtype)",
        "transformers.pipeline('text-generation')",
        "load_dataset('x')",
        "datasets.load_dataset('x', trust_remote_code='no')",
        "class Mine(HFLM): pass\nMine(pretrained=model)",
        "GenerationConfig.from_pretrained(place)",
    ],
)
def test_what_leaves_it_open_is_found(source):
    assert unsaid(source)


@pytest.mark.parametrize(
    "source", ["A.from_pretrained(x, trust_remote_code=False)", "A.from_config(c, trust_remote_code=trusted)"]
)
def test_what_says_it_is_let_through(source):
    assert unsaid(source) == []


@pytest.mark.parametrize("kind", [PeftConfig, PeftModel])
def test_what_needs_no_word_knows_no_code(kind):
    source = inspect.getsource(kind.from_pretrained)
    assert "trust_remote_code" not in source
    assert "import_module" not in source
    assert "Auto" not in source


def test_data_sets_take_the_word(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    found = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", trust_remote_code=False)
    assert list(found["text"]) == ["a"]
