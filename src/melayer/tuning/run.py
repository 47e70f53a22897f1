"""One training run: a model, rows and a trainer, with the mask on wherever the policy runs."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from melayer.errors import InputError, MelayerWarning
from melayer.interventions.apply import require_unmasked
from melayer.interventions.mask import WeMask
from melayer.loading import adapters
from melayer.model.provenance import ModelInfo, describe, versions
from melayer.tuning import checkpoints, run_directory
from melayer.tuning import config as training_config
from melayer.tuning import data as training_data
from melayer.tuning.restore import lent
from melayer.tuning.result import Method, Reference, Reward, TuneResult

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from melayer.tuning.trainers import Progress, Run

REWARD_WEIGHTS = (1.0, 0.2)
"""Of correctness and of the format, unless told otherwise."""
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


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


@dataclass(frozen=True, eq=False)
class Asked:
    """What the three methods are asked alike."""

    method: Method
    out: Path
    mask: WeMask | None
    lora: bool | Mapping[str, Any] | LoraConfig
    config: Mapping[str, Any] | str | Path | None
    seed: int
    resume: bool
    parts: Mapping[str, str] | None
    name: str | None
    progress: Progress | None
    reference: Reference = "masked"
    rewards: Sequence[Reward] | None = None


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    asked: Asked,
    row_options: dict[str, Any],
) -> TuneResult:
    """Trains as asked, and leaves the run's directory whole. See `melayer.sft`, `dpo` and `grpo`."""
    check_installed()
    if asked.reference not in get_args(Reference):
        raise InputError(f"reference is {asked.reference!r}; expected one of {', '.join(get_args(Reference))}.")
    started = time.monotonic()
    decoder = require_unmasked(model, asked.parts)
    info = describe(decoder, asked.name)
    mask = None if asked.mask is None else asked.mask.fixed(model, parts=asked.parts)
    given = training_config.read(Path(asked.config)) if isinstance(asked.config, (str, Path)) else asked.config or {}
    given = training_config.check(asked.method, given, masked=mask is not None)
    with _quiet():
        config = training_config.resolve(
            asked.method,
            given,
            out=asked.out,
            seed=asked.seed,
            validates=row_options["validation"] is not None,
            max_positions=decoder.max_positions,
        )
    if asked.method == "grpo" and config.reward_weights is None and asked.rewards is None:
        config.reward_weights = list(REWARD_WEIGHTS)
    prepared = _prepared(data, tokenizer, asked, config, row_options, decoder.max_positions)
    if prepared.assistant_only and "assistant_only_loss" not in given:
        config.assistant_only_loss = True
    needs_reference = asked.method == "dpo" or (asked.method == "grpo" and config.beta != 0)
    adapter = _adapter(asked.lora)
    reference_kind = asked.reference if needs_reference else None
    settings = _settings(asked, info, mask, reference_kind, adapter, prepared, config)
    notes = [*prepared.notes, *_stated(asked, mask, adapter is not None, config, needs_reference)]
    main = config.process_index == 0
    checkpoint = run_directory.opened(asked.out, settings, resume=asked.resume)
    if checkpoint is not None:
        config.eval_on_start = False  # that was before the first step
    from melayer.tuning import trainers

    about = trainers.Run(asked.out, info.name, mask, asked.reference, asked.progress)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(lent(model))
        plays = (model.config.use_cache, getattr(model.generation_config, "disable_compile", None))
        reference = copy.deepcopy(model) if needs_reference and adapter is None else None
        if mask is not None:
            stack.enter_context(mask.apply(model, parts=asked.parts, when=_policy_runs(model, asked, adapter)))
            if reference is not None and asked.reference == "masked":
                stack.enter_context(mask.apply(reference, parts=asked.parts))
        trainer = _trainer(model, copy.deepcopy(tokenizer), prepared, asked, config, adapter, reference, about)
        if trainers.is_sharded(trainer):
            kind = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
            notes.append(f"The weights were sharded with {kind} over {config.world_size} processes.")
        trainer.accelerator.wait_for_everyone()
        if main:
            run_directory.begin(asked.out, settings, checkpoint, resume=asked.resume)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1]))
        steps = int(trainer.state.global_step)
        if prepared.validation is not None and not _evaluated(trainer.state.log_history, steps):
            trainer.evaluate()
        # The trainer turned the cache off, and the mask compilation; who loads the result decides anew.
        trained = trainer.accelerator.unwrap_model(trainer.model)
        trained.config.use_cache, trained.generation_config.disable_compile = plays
        _save(trainer, asked.out, mask, info.name)
    history = run_directory.read_log(asked.out)
    logged = [line for line in history if not any(key.startswith("eval_") for key in line)]
    result = TuneResult(
        method=asked.method,
        out=str(asked.out),
        model=info,
        mask=mask,
        reference=reference_kind,
        adapter=adapter is not None,
        steps=steps,
        first=logged[0] if logged else {},
        last=logged[-1] if logged else {},
        validation=tuple(line for line in history if any(key.startswith("eval_") for key in line)),
        resumed_from=None if checkpoint is None else checkpoint[0],
        seconds=round(time.monotonic() - started, 3),
        settings=settings,
        versions=_versions(),
        notes=tuple(notes),
    )
    if main:
        run_directory.record(asked.out, {"status": "finished", **result.to_dict()})
    return result


def _prepared(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    config: Any,
    row_options: Mapping[str, Any],
    max_positions: int | None,
) -> training_data.Prepared:
    prepared = training_data.prepare(
        asked.method, data, tokenizer, **row_options, max_length=_longest(config, max_positions), seed=asked.seed
    )
    for note in prepared.notes:
        warnings.warn(note, MelayerWarning, stacklevel=5)
    return prepared


def _settings(
    asked: Asked,
    info: ModelInfo,
    mask: WeMask | None,
    reference: Reference | None,
    adapter: Any,
    prepared: training_data.Prepared,
    config: Any,
) -> dict[str, Any]:
    """All that the figures depend on: what a run records, and is held to when it goes on."""
    return {
        "method": asked.method,
        "model": info.to_dict(),
        "mask": None if mask is None else asdict(mask),
        "reference": reference,
        "lora": None if adapter is None else run_directory.plain(adapter.to_dict()),
        "data": prepared.to_dict(),
        "config": training_config.recorded(config),
        "processes": config.world_size,
        "rewards": _reward_names(asked) if asked.method == "grpo" else None,
        "layers_counted_from": 0,
    }


def _evaluated(history: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any("eval_runtime" in line and line.get("step") == step for line in history)


def _longest(config: Any, max_positions: int | None) -> int | None:
    """Tokens that a row may have; of GRPO's rows, the prompt."""
    asked = getattr(config, "max_length", None)
    if hasattr(config, "max_completion_length"):
        if max_positions is None:
            return None
        left = max_positions - (config.max_completion_length or 0)
        if left < 1:
            raise InputError(
                f"max_completion_length is {config.max_completion_length}, but the model has {max_positions} "
                "positions, so there is no room for a prompt. Give fewer."
            )
        return left
    if asked is not None and max_positions is not None and asked > max_positions:
        raise InputError(f"max_length is {asked}, but the model has {max_positions} positions. Give at most as many.")
    longest: int | None = asked if asked is not None else max_positions
    return longest


def _adapter(lora: bool | Mapping[str, Any] | LoraConfig) -> Any:
    """The adapter's config; None without one."""
    from peft import LoraConfig

    if lora is False:
        return None
    if isinstance(lora, LoraConfig):
        found = copy.deepcopy(lora)
    else:
        try:
            found = LoraConfig(**{**_LORA, **({} if lora is True else lora)})
        except (TypeError, ValueError) as error:
            raise InputError(f"peft refuses the LoRA options: {error}. See the fields of peft.LoraConfig.") from error
    return found


def _policy_runs(model: nn.Module, asked: Asked, adapter: Any) -> Callable[[], bool] | None:
    """With a plain reference, an adapter's base is the reference: the mask is off while the adapter is."""
    if adapter is None or asked.reference == "masked":
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[BaseTunerLayer] = []

    def runs() -> bool:
        if not found:
            # The trainer puts the adapter in after the mask.
            found.extend(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        return not (found and found[0].disable_adapters)

    return runs


def _reward_names(asked: Asked) -> list[str]:
    return [getattr(reward, "__name__", type(reward).__name__) for reward in _rewards(asked)]


def _rewards(asked: Asked) -> list[Reward]:
    from melayer.tuning.rewards import answer_format, correctness

    return [correctness, answer_format] if asked.rewards is None else list(asked.rewards)


def _stated(asked: Asked, mask: WeMask | None, adapter: bool, config: Any, needs_reference: bool) -> list[str]:
    """What was chosen and cannot be seen in the figures."""
    said = []
    if mask is not None:
        where = "in training, evaluation and roll-outs" if asked.method == "grpo" else "in training and evaluation"
        said.append(f"The mask is on wherever the policy runs: {where}. Its dimensions are those of the first step.")
    if asked.method == "grpo" and not needs_reference:
        said.append("beta is 0, so there is no reference model and no KL.")
    elif needs_reference:
        kind = "the model without its adapter" if adapter else "a copy of the first weights"
        treated = "" if mask is None else ", masked as the policy is" if asked.reference == "masked" else ", not masked"
        said.append(f"The reference is {kind}{treated}.")
    return said


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: training_data.Prepared,
    asked: Asked,
    config: Any,
    adapter: Any,
    reference: Any,
    about: Run,
) -> Any:
    from melayer.tuning import trainers

    shared: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": prepared.rows,
        "eval_dataset": prepared.validation,
        "processing_class": tokenizer,
        "peft_config": adapter,
        "run": about,
    }
    try:
        if asked.method == "sft":
            return trainers.Supervised(**shared)
        if asked.method == "dpo":
            trainer = trainers.Preference(**shared, ref_model=reference)
            if config.precompute_ref_log_probs:
                trainer.ref_model = None  # it has said all that it is asked
            return trainer
        with trainers.reference_given(reference):
            return trainers.Rewarded(**shared, reward_funcs=_rewards(asked))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"The trainer refuses this: {str(error).strip().splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries have to say to each other about renamed options is kept from the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate)\b")
        yield


def _save(trainer: Any, out: Path, mask: WeMask | None, name: str) -> None:
    """The trained model, its tokenizer and its mask, moved into place once all of it is written."""
    from melayer.tuning.trainers import is_sharded, saved_mask

    sharded = is_sharded(trainer)
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
            adapters.name_base(staging, name)
            if mask is not None:
                saved_mask(mask, trainer.model, sharded=sharded).save(staging)
            weights = "config.json" if (staging / "config.json").exists() else "adapter_config.json"
            checkpoints.publish_files(staging, out, weights)
            staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def _versions() -> dict[str, str]:
    found = versions()
    return {**found, **{name: version(name) for name in ("trl", "peft", "accelerate", "datasets", "math-verify")}}
