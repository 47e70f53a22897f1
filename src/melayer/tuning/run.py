"""One training run: a model, rows and a trainer, with the mask on wherever the policy runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from melayer.errors import InputError, first_line, require_known
from melayer.interventions.apply import require_unmasked
from melayer.loading import adapters
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
        generation = (model.config.use_cache, getattr(model.generation_config, "disable_compile", None))
        trainer = _trainer(plan, _masked(plan, stack))
        if is_sharded(trainer):
            kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
            notes.append(f"The weights were sharded with {kind} over {plan.config.world_size} processes.")
        trainer.accelerator.wait_for_everyone()
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


def _masked(plan: Plan, stack: ExitStack) -> nn.Module | None:
    """Masks the policy, and makes the reference, masked as was asked for; None where the policy itself is it."""
    reference = copy.deepcopy(plan.subject.model) if plan.reference is not None and plan.adapter is None else None
    if plan.mask is not None:
        stack.enter_context(plan.mask.apply(plan.subject.decoder, when=_policy_runs(plan)))
        if reference is not None and plan.reference == "masked":
            stack.enter_context(plan.mask.apply(reference, parts=plan.job.parts))
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
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"The trainer refuses this: {first_line(error)}") from error


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
            weights = "config.json" if (staging / "config.json").exists() else "adapter_config.json"
            checkpoints.publish_files(staging, out, weights)
            staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of the log is of validation rows."""
    return any(key.startswith("eval_") for key in line)


def _evaluated(history: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any("eval_runtime" in line and line.get("step") == step for line in history)


def _versions() -> dict[str, str]:
    return versions() | {name: version(name) for name in ("trl", "peft", "accelerate", "datasets", "math-verify")}
