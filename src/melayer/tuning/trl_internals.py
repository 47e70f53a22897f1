"""The inside of TRL's trainers and of transformers' below them, under names of ours: no other module knows it.

Nothing of it is promised to stay. pyproject.toml says up to which version it was tried, and `require_known_version`
says at the start of a run what is no longer as it was.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer import grpo_trainer

from melayer.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Detail:
    """One thing that is relied on."""

    name: str
    trainers: tuple[type, ...]
    what: str
    """What it is good for."""
    parameters: tuple[str, ...] | None = None
    """Of a method that is replaced, after `self`; None for an attribute or a global name that the trainers use."""

    def changes(self) -> list[str]:
        """What is no longer as it was."""
        found = []
        for trainer in self.trainers:
            if self.parameters is None:
                if not uses(trainer, self.name):
                    found.append(f"{trainer.__name__} does not use {self.name}, {self.what}")
            elif (method := getattr(trainer, self.name, None)) is None:
                found.append(f"{trainer.__name__} has no {self.name}, {self.what}")
            elif (taken := tuple(inspect.signature(method).parameters)[1:]) != self.parameters:
                found.append(
                    f"{trainer.__name__}.{self.name}, {self.what}, takes ({', '.join(taken)}) and not "
                    f"({', '.join(self.parameters)})"
                )
        return found


_ALL = (SFTTrainer, DPOTrainer, GRPOTrainer)
DETAILS = (
    Detail("_get_output_dir", _ALL, "which says where checkpoints are written", ("trial",)),
    Detail("_save_checkpoint", _ALL, "which writes a checkpoint", ("model", "trial")),
    Detail("_tr_loss", _ALL, "the loss since the last logged step"),
    Detail("_globalstep_last_logged", _ALL, "the last logged step"),
    Detail("_metrics", _ALL, "the figures since the last logged step"),
    Detail("_total_train_tokens", _ALL, "the tokens so far"),
    Detail("_step", (GRPOTrainer,), "the batches so far"),
    Detail("_buffered_inputs", (GRPOTrainer,), "the completions that the next steps learn from"),
    Detail("create_model_from_path", (GRPOTrainer,), "which loads the reference"),
    Detail(
        "_precompute_ref_logps", (DPOTrainer,), "which asks the reference beforehand", ("dataset", "name", "batch_size")
    ),
    Detail("_precompute_model_hash", (DPOTrainer,), "by which the reference's answers are cached"),
)
"""All that is relied on."""


def require_known_version(details: Sequence[Detail] = DETAILS) -> None:
    """Raises InputError if TRL or transformers is not as this module knows it."""
    changes = [change for detail in details for change in detail.changes()]
    if changes:
        raise InputError(
            f"melayer does not know the trainers of trl {version('trl')} with transformers {version('transformers')}: "
            f"{'; '.join(changes)}. Get versions that it knows with: pip install 'melayer[tune]'"
        )


def uses(trainer: type, name: str) -> bool:
    """Whether any method of a class, or of those below it, reads or sets this attribute or global name."""
    functions = [vars(kind).values() for kind in trainer.__mro__]
    codes = [
        inspect.unwrap(function).__code__ for kind in functions for function in kind if inspect.isfunction(function)
    ]
    return any(name in code.co_names for code in codes)


class OpenTrainer:
    """Put before one of the trainers: checkpoints where we want them, and what a checkpoint leaves out."""

    staging: Path | None = None
    """Where checkpoints are written; None for their usual place."""

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Called for each checkpoint with what writes it."""
        write()

    def counters(self) -> dict[str, Any]:
        """What decides the next figures and is in none of the trainer's own files."""
        trainer: Any = self
        state: dict[str, Any] = {
            "loss": trainer._tr_loss.detach().cpu(),
            "last_logged": trainer._globalstep_last_logged,
            "metrics": {key: list(values) for key, values in trainer._metrics["train"].items()},
            "tokens": trainer._total_train_tokens,
        }
        if isinstance(self, GRPOTrainer):
            every = trainer.args.steps_per_generation * trainer.num_iterations
            # Completions that the next steps will still learn from.
            due = trainer._step % every == 0
            state |= {"step": trainer._step, "rollouts": None if due else trainer._buffered_inputs}
        return state

    def set_counters(self, state: dict[str, Any]) -> None:
        """Puts back what `counters` gave, once the trainer has set its own to zero."""
        trainer: Any = self
        _check_counters(state, rollouts=isinstance(self, GRPOTrainer))
        device = trainer.args.device
        trainer._tr_loss = state["loss"].to(device)
        trainer._globalstep_last_logged = state["last_logged"]
        trainer._metrics["train"] = defaultdict(list, state["metrics"])
        trainer._total_train_tokens = state["tokens"]
        if isinstance(self, GRPOTrainer):
            trainer._step = state["step"]
            trainer._buffered_inputs = _on(state["rollouts"], device)

    def _get_output_dir(self, trial: Any) -> str:
        usual: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return usual if self.staging is None else str(self.staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        write = super()._save_checkpoint  # type: ignore[misc]
        self.write_checkpoint(lambda: write(model, trial))


class KeyedReference:
    """Put before DPO's trainer, which caches what the reference says of the data by these and the weights alone."""

    reference_key: str = "None"
    """What else the reference's answers depend on."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        trainer: Any = self
        weights = str(trainer._precompute_model_hash).partition(" ")[0]
        trainer._precompute_model_hash = f"{weights} {self.reference_key}"
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]


@contextmanager
def reference_given(model: Any) -> Iterator[None]:
    """Inside the context GRPO takes this model as its reference, where it would load one by the policy's name.

    It has no argument for it, and a model by that name would be without the mask, or not be there at all.
    """
    original = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: model
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template, or TRL's own for it, tells the assistant's tokens from the others."""
    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:  # it has none for this template
        return False


def _check_counters(state: Any, *, rollouts: bool) -> None:
    """Raises ValueError unless it is of the form that `counters` gives, whole."""
    expected = {"loss", "last_logged", "metrics", "tokens"} | ({"step", "rollouts"} if rollouts else set())
    if not isinstance(state, dict) or state.keys() != expected:
        raise ValueError(f"it does not hold {', '.join(sorted(expected))}")
    loss = state["loss"]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError("its loss is no number")
    for name in ("last_logged", "tokens", *(["step"] if rollouts else [])):
        number = state[name]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 2**63:
            raise ValueError(f"its {name} is no count")
    metrics = state["metrics"]
    if not isinstance(metrics, dict) or not all(
        isinstance(key, str) and isinstance(values, list) for key, values in metrics.items()
    ):
        raise ValueError("its metrics are no lists by name")
    kept = state.get("rollouts")
    if kept is not None and not (isinstance(kept, list) and all(isinstance(part, dict) for part in kept)):
        raise ValueError("its completions are no list of batches")


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value
