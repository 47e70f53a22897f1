"""One training run: a model, rows and a trainer, with the mask on wherever the policy runs."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from melayer.errors import InputError, MelayerError, TrainingError, reason, require_known
from melayer.interventions import card
from melayer.interventions.at_work import require_unmasked
from melayer.loading import adapters
from melayer.model.hooks import known_ids
from melayer.model.provenance import describe, versions
from melayer.model.subject import Subject
from melayer.tuning import checkpoints, run_directory
from melayer.tuning.checkpoints import Checkpoint
from melayer.tuning.config import quiet
from melayer.tuning.cut_off import cut_off_notes
from melayer.tuning.data import RowOptions
from melayer.tuning.job import TrainingJob
from melayer.tuning.plan import Plan, planned
from melayer.tuning.restore import restored
from melayer.tuning.result import Reference, TuneResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_installed() -> None:
    """Raises InputError unless the libraries of the extra are there."""
    try:
        import datasets  # noqa: F401
        import math_verify  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"Fine-tuning needs {error.name}, which is not installed. Get it with: pip install 'melayer[tune]'"
        ) from error


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Any, job: TrainingJob, row_options: RowOptions
) -> TuneResult:
    """Trains as asked, and leaves the run's directory whole. See `melayer.sft`, `dpo` and `grpo`."""
    check_installed()
    from melayer.tuning.trl_internals import require_known_version

    require_known_version()
    require_known(job.reference, get_args(Reference), f"reference is {job.reference!r}")
    started = time.monotonic()
    decoder = require_unmasked(model, job.parts)
    plan = planned(Subject(decoder, tokenizer, describe(decoder, job.name)), data, job, row_options)
    with run_directory.kept_if_anything_is(job.out):
        checkpoint = run_directory.opened(job.out, plan.settings, resume=job.resume)
        if checkpoint is not None:
            plan.config.eval_on_start = False  # that was before the first step
        steps, notes = _trained(plan, checkpoint)
    history = run_directory.read_log(job.out)
    evaluations = [line for line in history if _is_evaluation(line)]
    logged = [line for line in history if not _is_evaluation(line)]
    result = TuneResult(
        method=job.method,
        out=str(job.out),
        model=plan.subject.info,
        mask=plan.mask,
        reference=plan.reference,
        adapter=plan.adapter is not None,
        steps=steps,
        first=logged[0] if logged else {},
        last=logged[-1] if logged else {},
        validation=tuple(evaluations),
        resumed_from=None if checkpoint is None else checkpoint.step,
        seconds=round(time.monotonic() - started, 3),
        settings=plan.settings,
        versions=_versions(),
        notes=(*plan.notes, *notes, *cut_off_notes(history, getattr(plan.config, "max_completion_length", None))),
    )
    if plan.config.process_index == 0:
        run_directory.record(job.out, {"status": "finished", **result.to_dict()})
    return result


def _trained(plan: Plan, checkpoint: Checkpoint | None) -> tuple[int, list[str]]:
    """Trains and saves, and gives the model back; returns the steps in all and what there is to say."""
    from melayer.tuning.trainers import is_sharded

    job, model, notes = plan.job, plan.subject.model, []
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(restored(model))
        stack.enter_context(known_ids(model))
        generation = (model.config.use_cache, getattr(model.generation_config, "disable_compile", None))
        trainer = _trainer(plan, _masked(plan, stack))
        if is_sharded(trainer):
            kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
            notes.append(f"The weights were sharded with {kind} over {plan.config.world_size} processes.")
        trainer.accelerator.wait_for_everyone()
        with _explained(trainer, plan, checkpoint):
            if plan.config.process_index == 0:
                run_directory.begin(job.out, plan.settings, checkpoint, resume=job.resume)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
            steps = int(trainer.state.global_step)
            if plan.prepared.validation is not None and not _evaluated(trainer.state.log_history, steps):
                trainer.evaluate()
        # The trainer turned the cache off, and the mask compilation; who loads the result decides anew.
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trained.config.use_cache, trained.generation_config.disable_compile = generation
        _save(trainer, plan)
    return steps, notes


@contextmanager
def _explained(trainer: Any, plan: Plan, checkpoint: Checkpoint | None) -> Iterator[None]:
    """What a trainer, a reward or a library raises becomes a sentence; a run that has learnt nothing is forgotten."""
    out = plan.job.out
    own_log = not plan.job.resume and not os.path.lexists(out / run_directory.LOG)
    try:
        yield
    except Exception as error:
        step = int(trainer.state.global_step)
        nothing = step == 0 and not plan.job.resume and checkpoints.last(out) is None
        if nothing and plan.config.process_index == 0:
            run_directory.take_back(out, log=own_log)
        if isinstance(error, MelayerError):
            raise
        if nothing:
            raise InputError(
                f"Training failed before its first step: {reason(error)}. Nothing was learnt, and nothing is kept in "
                f"{out}: mend that, and start again there."
            ) from error
        if checkpoint is not None and step in (0, checkpoint.step):
            raise InputError(
                f"The run in {out} cannot go on from {checkpoint.path.name}: {reason(error)}. Remove {checkpoint.path} "
                "to go on from the checkpoint before it, or begin in another directory."
            ) from error
        kept = checkpoints.last(out)
        good = "there was no checkpoint yet" if kept is None else f"the checkpoint of step {kept.step} is kept"
        raise TrainingError(
            f"Training failed after step {step}: {reason(error)}. It stopped, and {good}; go on with --resume."
        ) from error


def _masked(plan: Plan, stack: ExitStack) -> nn.Module | None:
    """Masks the policy, and makes the reference, masked as was asked for; None where the policy itself is it."""
    reference = copy.deepcopy(plan.subject.model) if plan.reference is not None and plan.adapter is None else None
    if plan.mask is not None:
        stack.enter_context(plan.mask.apply(plan.subject.decoder, when=_policy_runs(plan), saved=False))
        if reference is not None and plan.reference == "masked":
            stack.enter_context(plan.mask.apply(reference, parts=plan.job.parts, saved=False))
    return reference


def _policy_runs(plan: Plan) -> Callable[[], bool] | None:
    """With a plain reference, an adapter's base is the reference: the mask is off while the adapter is."""
    if plan.adapter is None or plan.job.reference == "masked":
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[BaseTunerLayer] = []

    def runs() -> bool:
        if not found:
            # The trainer puts the adapter in after the mask.
            found.extend(layer for layer in plan.subject.model.modules() if isinstance(layer, BaseTunerLayer))
        return not (found and found[0].disable_adapters)

    return runs


def _trainer(plan: Plan, reference: nn.Module | None) -> Any:
    from melayer.tuning import trainers
    from melayer.tuning.trl_internals import reference_given

    job = plan.job
    shared: dict[str, Any] = {
        "model": plan.subject.model,
        "args": plan.config,
        "train_dataset": plan.prepared.rows,
        "eval_dataset": plan.prepared.validation,
        "processing_class": copy.deepcopy(plan.subject.tokenizer),
        "peft_config": plan.adapter,
        "run_context": trainers.RunContext(job.out, plan.subject.info.name, plan.mask, job.reference, job.progress),
    }
    try:
        if job.method == "sft":
            return trainers.Supervised(**shared)
        if job.method == "dpo":
            trainer = trainers.Preference(**shared, ref_model=reference)
            if plan.config.precompute_ref_log_probs:
                trainer.ref_model = None  # it has said all that it is asked
            return trainer
        with reference_given(reference):
            return trainers.Rewarded(**shared, reward_funcs=job.reward_functions)
    except MelayerError:
        raise
    except Exception as error:
        raise InputError(f"The trainer refuses this: {reason(error)}.") from error


def _save(trainer: Any, plan: Plan) -> None:
    """The trained model, its tokenizer and its mask, moved into place once all of it is written."""
    from melayer.tuning.trainers import is_sharded, saved_mask

    out, sharded = plan.job.out, is_sharded(trainer)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    main = trainer.args.should_save
    with checkpoints.writing("The trained model", out):
        staging = checkpoints.clear(out) if main else out / checkpoints.STAGING
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(staging))
        if main:
            # A pickle with this machine's paths, and PEFT's card: the run's own files say what was done.
            for extra in ("training_args.bin", "README.md"):
                (staging / extra).unlink(missing_ok=True)
            adapters.name_base(staging, plan.subject.info.name)
            if plan.mask is not None:
                saved_mask(plan.mask, trainer.model, sharded=sharded).save(staging)
                _write_card(plan, staging)
            weights = "config.json" if (staging / "config.json").exists() else "adapter_config.json"
            checkpoints.publish_files(staging, out, weights)
            staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def _write_card(plan: Plan, staging: Path) -> None:
    """Beside the weights, before they are moved into place, what loads them with the mask."""
    assert plan.mask is not None
    if not card.may_write(plan.job.out):
        (staging / card.CARD).unlink(missing_ok=True)
        return
    made = f"It was trained under the mask ({plan.job.method.upper()}, `melayer tune`)."
    card.write(staging, plan.mask.words, made=made, adapter=plan.adapter is not None)


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of the log is of validation rows."""
    return any(key.startswith("eval_") for key in line)


def _evaluated(history: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any("eval_runtime" in line and line.get("step") == step for line in history)


def _versions() -> dict[str, str]:
    return versions() | {name: version(name) for name in ("trl", "peft", "accelerate", "datasets", "math-verify")}
