"""TRL's trainers with whole checkpoints, an end at the first NaN, and runs that go on exactly where they were."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.trainer import grpo_trainer

from melayer.errors import TrainingError
from melayer.interventions.mask import WeMask
from melayer.loading import adapters
from melayer.model.provenance import fingerprint
from melayer.runs import jsonl
from melayer.tuning import checkpoints

LOG = "log.jsonl"
Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the steps done, the steps in all, and the figures of the last one."""


@dataclass(frozen=True, eq=False)
class Run:
    """What a trainer knows of the run that it is part of."""

    out: Path
    model: str
    """The name of the model that training began with."""
    mask: WeMask | None
    reference: str
    progress: Progress | None = None


class _NothingLeft(Exception):  # noqa: N818 - no error
    """All steps were done before."""


class _Run(TrainerCallback):
    """Keeps the log, reports progress, and puts back what a checkpoint holds of the trainer itself."""

    def __init__(self, trainer: _WholeMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The trainer has set its counters to zero by now."""
        self.trainer.restore()
        if self.trainer._restored_from is not None and state.global_step >= state.max_steps:
            # The run was stopped while it wrote its result; the trainer would make one step too many.
            raise _NothingLeft

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One line for each."""
        # The summary of a call of train() is about that call, and a run may take several.
        if not state.is_world_process_zero or logs is None or "train_runtime" in logs:
            return
        # JSON has no NaN; the loss itself is never one here.
        line = {key: _finite(value) for key, value in logs.items()}
        run = self.trainer.run
        with jsonl.keeping("log", run.out / LOG):
            jsonl.append(run.out / LOG, [{"step": state.global_step, **line}])
        if run.progress is not None:
            run.progress(state.global_step, state.max_steps, {k: v for k, v in line.items() if v is not None})


class _WholeMixin:
    """What our trainers have in common, put before TRL's own classes."""

    run: Run
    _staging: Path | None = None
    _restored_from: Path | None = None

    def __init__(self, *args: Any, run: Run, **options: Any) -> None:
        # Before the trainer's own, which computes reference log-probabilities already.
        self.run = run
        super().__init__(*args, **options)
        trainer: Any = self
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Run(self))

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """As the trainer's own."""
        self._restored_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)  # type: ignore[misc]
        except _NothingLeft:
            return None

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None: the run's own page says what was done."""

    # --- NaN -------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """As the trainer's own, and the end where the loss is no number: before it reaches a weight."""
        trainer: Any = self
        loss: torch.Tensor = super().training_step(*args, **options)  # type: ignore[misc]
        bad = (~torch.isfinite(loss.detach())).any()
        if trainer.accelerator.num_processes > 1:
            # All processes stop, or none: those that went on would wait for the others for ever.
            bad = trainer.accelerator.reduce(bad.float(), reduction="sum") > 0
        if bool(bad):
            self._stop(f"The loss of step {trainer.state.global_step + 1} is {_shown(loss)}")
        return loss

    def _stop(self, what: str) -> None:
        kept = checkpoints.last(self.run.out)
        good = f"the checkpoint of step {kept[0]} is kept" if kept else "there was no checkpoint yet"
        raise TrainingError(
            f"{what}, so training stopped; {good}. Try a smaller learning rate, max_grad_norm, or float32, in another "
            "directory."
        )

    def _all_finite(self) -> bool:
        trainer: Any = self
        flags = [torch.isfinite(p.detach()).all() for p in trainer.model.parameters() if p.requires_grad]
        local = [flag.to_local() if hasattr(flag, "to_local") else flag for flag in flags]
        bad = sum((~flag).float().sum().to(trainer.accelerator.device) for flag in local)
        if trainer.accelerator.num_processes > 1:
            bad = trainer.accelerator.reduce(torch.as_tensor(bad), reduction="sum")
        return float(bad) == 0

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        own: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return own if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint under a temporary name, renamed once all of it is on the disk."""
        trainer: Any = self
        step, out, main = trainer.state.global_step, self.run.out, trainer.args.should_save
        if not self._all_finite():
            self._stop(f"After step {step} some weights are not finite")
        name = f"checkpoint-{step}"
        with checkpoints.writing(f"The checkpoint of step {step}", out):
            if main:
                checkpoints.clear(out)
            trainer.accelerator.wait_for_everyone()
            self._staging = out / checkpoints.STAGING
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                staged, self._staging = self._staging / name, None
            torch.save(self._own_state(), staged / f"melayer_state_{trainer.args.process_index}.pt")
            if main:
                self._finish(staged, out)
            trainer.accelerator.wait_for_everyone()
            if main:
                checkpoints.publish(staged, out / name)
                (out / checkpoints.STAGING).rmdir()
                rotate_checkpoints(str(out), trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
            trainer.accelerator.wait_for_everyone()

    def _finish(self, staged: Path, out: Path) -> None:
        """What the trainer could not know in a directory with a temporary name, and the mask beside the weights."""
        trainer: Any = self
        best = trainer.state.best_global_step
        if best and (best == trainer.state.global_step or (out / f"checkpoint-{best}").is_dir()):
            trainer.state.best_model_checkpoint = str(out / f"checkpoint-{best}")
        trainer.state.save_to_json(str(staged / "trainer_state.json"))
        adapters.name_base(staged, self.run.model)
        if self.run.mask is not None:
            saved_mask(self.run.mask, trainer.model, sharded=is_sharded(trainer)).save(staged)

    def _own_state(self) -> dict[str, Any]:
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

    def restore(self) -> None:
        """Puts back what the checkpoint that the run goes on from holds of the trainer itself."""
        if self._restored_from is None:
            return
        trainer: Any = self
        path = self._restored_from / f"melayer_state_{trainer.args.process_index}.pt"
        state = torch.load(path, weights_only=True, map_location="cpu")
        device = trainer.args.device
        trainer._tr_loss = state["loss"].to(device)
        trainer._globalstep_last_logged = state["last_logged"]
        trainer._metrics["train"] = defaultdict(list, state["metrics"])
        trainer._total_train_tokens = state["tokens"]
        if isinstance(self, GRPOTrainer):
            trainer._step = state["step"]
            trainer._buffered_inputs = _on(state["rollouts"], device)


class Supervised(_WholeMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFT."""


class Preference(_WholeMixin, DPOTrainer):  # type: ignore[misc]
    """TRL's DPO."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As TRL's, which caches by data and weights: the mask is neither, and changes what it computes."""
        mask = self.run.mask if self.run.reference == "masked" else None
        trainer: Any = self
        known = str(trainer._precompute_model_hash).partition(" ")[0]
        trainer._precompute_model_hash = f"{known} {mask}"
        return super()._precompute_ref_logps(dataset, name, batch_size)


class Rewarded(_WholeMixin, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO."""


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


def is_sharded(trainer: Any) -> bool:
    """Whether no process holds all weights."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def saved_mask(mask: WeMask, model: Any, *, sharded: bool) -> WeMask:
    """The mask as it goes beside trained weights: made for these, so that nothing warns of other ones.

    An adapter leaves the weights that the mask was made for as they are. Of sharded weights nothing is said.
    """
    if mask.made_for is None or hasattr(model, "peft_config"):
        return mask
    return replace(mask, made_for=None if sharded else replace(mask.made_for, fingerprint=fingerprint(model)))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(loss: torch.Tensor) -> str:
    value = float(loss.detach().float())
    return "not finite in another process" if math.isfinite(value) else str(value)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value
