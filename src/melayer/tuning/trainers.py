"""TRL's trainers with whole checkpoints, an end at the first NaN, and runs that go on exactly where they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from melayer.errors import TrainingError, border
from melayer.interventions import card
from melayer.interventions.mask import WeMask
from melayer.loading import adapters
from melayer.model.provenance import fingerprint
from melayer.tuning import checkpoints, run_directory
from melayer.tuning.result import Reference, TrainingProgress
from melayer.tuning.trl_internals import KeyedReference, OpenTrainer


@dataclass(frozen=True, eq=False)
class RunContext:
    """What a trainer knows of the run that it is part of."""

    out: Path
    model: str
    """The name of the model that training began with."""
    mask: WeMask | None
    reference: Reference
    progress: TrainingProgress | None = None


class _NothingLeft(Exception):  # noqa: N818 - no error
    """All steps were done before."""


class RunCallback(TrainerCallback):
    """Keeps the log, reports progress, and puts back what a checkpoint holds of the trainer itself."""

    def __init__(self, trainer: _ResumableMixin) -> None:
        """The callback of this trainer."""
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The trainer has set its counters to zero by now."""
        self.trainer.restore()
        if self.trainer.resumed_from is not None and state.global_step >= state.max_steps:
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
        run = self.trainer.run_context
        run_directory.add_to_log(run.out, {"step": state.global_step, **line})
        if run.progress is not None:
            run.progress(state.global_step, state.max_steps, {k: v for k, v in line.items() if v is not None})


class _ResumableMixin(OpenTrainer):
    """What our trainers have in common, put before TRL's own classes."""

    run_context: RunContext
    resumed_from: Path | None = None

    def __init__(self, *args: Any, run_context: RunContext, **options: Any) -> None:
        # Before the trainer's own, which computes reference log-probabilities already.
        self.run_context = run_context
        super().__init__(*args, **options)
        trainer: Any = self
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(RunCallback(self))

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """As the trainer's own."""
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)  # type: ignore[misc]
        except _NothingLeft:
            return None

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None: the run's own page says what was done."""

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
        kept = checkpoints.last(self.run_context.out)
        good = f"the checkpoint of step {kept.step} is kept" if kept else "there was no checkpoint yet"
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

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """A checkpoint under a temporary name, renamed once all of it is on the disk."""
        trainer: Any = self
        step, out, main = trainer.state.global_step, self.run_context.out, trainer.args.should_save
        if not self._all_finite():
            self._stop(f"After step {step} some weights are not finite")
        name = f"checkpoint-{step}"
        with checkpoints.writing(f"The checkpoint of step {step}", out):
            if main:
                checkpoints.clear(out)
            trainer.accelerator.wait_for_everyone()
            self.staging = out / checkpoints.STAGING
            try:
                write()
            finally:
                staged, self.staging = self.staging / name, None
            torch.save(self.counters(), staged / self._counters_file)
            if main:
                self._complete(staged)
            trainer.accelerator.wait_for_everyone()
            if main:
                checkpoints.publish(staged, out / name)
                (out / checkpoints.STAGING).rmdir()
                rotate_checkpoints(str(out), trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
            trainer.accelerator.wait_for_everyone()

    def _complete(self, staged: Path) -> None:
        """What the trainer could not know in a directory with a temporary name, and the mask beside the weights."""
        trainer: Any = self
        best, out = trainer.state.best_global_step, self.run_context.out
        if best and (best == trainer.state.global_step or (out / f"checkpoint-{best}").is_dir()):
            trainer.state.best_model_checkpoint = str(out / f"checkpoint-{best}")
        trainer.state.save_to_json(str(staged / "trainer_state.json"))
        adapters.name_base(staged, self.run_context.model)
        (staged / card.CARD).unlink(missing_ok=True)  # PEFT's: ours says what loads it
        if self.run_context.mask is not None:
            saved_mask(self.run_context.mask, trainer.model, sharded=is_sharded(trainer)).save(staged)

    def restore(self) -> None:
        """Puts back what the checkpoint that the run goes on from holds of the trainer itself."""
        if self.resumed_from is not None:
            path = self.resumed_from / self._counters_file
            # The next figures depend on it, and the trainer would go on without a word.
            todo = f"Remove {self.resumed_from} to go on from the checkpoint before it."
            with border(f"{path} cannot be read", todo):
                self.set_counters(torch.load(path, weights_only=True, map_location="cpu"))

    @property
    def _counters_file(self) -> str:
        trainer: Any = self
        return f"melayer_state_{trainer.args.process_index}.pt"


class Supervised(_ResumableMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFT."""


class Preference(_ResumableMixin, KeyedReference, DPOTrainer):  # type: ignore[misc]
    """TRL's DPO."""

    @property
    def reference_key(self) -> str:  # type: ignore[override]
        """The mask, which is neither data nor weights, and changes what the reference says."""
        return str(self.run_context.mask if self.run_context.reference == "masked" else None)


class Rewarded(_ResumableMixin, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO."""


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
