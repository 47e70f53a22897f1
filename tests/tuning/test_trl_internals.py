"""Everything that is relied on inside TRL, by name: what fails here says what a new version of TRL has changed."""

import ast
from pathlib import Path

import pytest
from trl import GRPOTrainer, SFTTrainer
from trl.trainer import grpo_trainer

import melayer
import small_runs
import toys
from melayer.errors import InputError
from melayer.tuning import trainers, trl_internals
from melayer.tuning.trl_internals import DETAILS, Detail, reference_given, require_known_version

SOURCES = sorted(Path(trl_internals.__file__).parent.glob("*.py"))
# What holds an object of TRL's or transformers', in our sources.
FOREIGN = {"trainer", "trl", "grpo_trainer", "transformers"}


@pytest.mark.parametrize("detail", DETAILS, ids=lambda detail: detail.name)
def test_it_is_as_we_know_it(detail):
    assert not detail.changes(), "TRL has changed; see melayer/tuning/trl_internals.py, and raise the cap with care"


def private(source):
    """The private names of foreign objects that a source reads, sets or replaces."""
    tree = ast.parse(source)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(of, ast.Name) and of.id in FOREIGN | {"super"}:
                found.add(node.attr)
    return found


def test_nothing_else_is_relied_on():
    found = {path.name: names for path in SOURCES if (names := private(path.read_text(encoding="utf-8")))}
    assert list(found) == ["trl_internals.py"]
    assert found["trl_internals.py"] | {"create_model_from_path"} == {detail.name for detail in DETAILS}
    assert private("trainer._a = super()._b(other._c)") == {"_a", "_b"}  # the equality above can fail


@pytest.mark.parametrize("kind", [trainers.Supervised, trainers.Preference, trainers.Rewarded])
def test_our_names_hide_none_of_theirs(kind):
    own = [base for base in kind.__mro__ if base.__module__.startswith("melayer.")]
    theirs = [base for base in kind.__mro__ if base not in own]
    replaced = {"__init__", "train", "training_step", "create_model_card"} | {detail.name for detail in DETAILS}
    names = {name for base in own for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    for base in theirs[:-1]:
        hidden = {name for name in names if name in vars(base) or trl_internals.uses(base, name)}
        assert {name for name in hidden if not name.startswith("__")} <= replaced, base


def test_what_has_changed_is_said(monkeypatch):
    assert Detail("_a", (SFTTrainer,), "the first").changes() == ["SFTTrainer does not use _a, the first"]
    assert Detail("_b", (SFTTrainer,), "the second", ()).changes() == ["SFTTrainer has no _b, the second"]
    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", lambda self, model: None)
    message = (
        r"does not know the trainers of trl \d.* with transformers \d.*: GRPOTrainer._save_checkpoint, which writes a "
        r"checkpoint, takes \(model\) and not \(model, trial\)\. .*pip install 'melayer\[tune\]'"
    )
    with pytest.raises(InputError, match=message):
        require_known_version()
    with pytest.raises(InputError, match=message):
        melayer.sft(small_runs.model(), toys.tokenizer(), small_runs.answers(2), out="nowhere")
    assert not Path("nowhere").exists()


def test_trl_has_its_own_function_again():
    own = grpo_trainer.create_model_from_path
    with pytest.raises(ZeroDivisionError), reference_given("a model"):
        assert grpo_trainer.create_model_from_path("a name", dtype=None) == "a model"
        raise ZeroDivisionError
    assert grpo_trainer.create_model_from_path is own
