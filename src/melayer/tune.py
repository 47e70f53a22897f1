"""Fine-tuning with the mask on: SFT, DPO and GRPO through TRL, the mask active wherever the policy runs."""

from __future__ import annotations

import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from melayer import architecture, checkpoints, jsonl, training_config, training_data
from melayer.errors import InputError, MelayerWarning, OutputError
from melayer.mask import WeMask
from melayer.masking import free
from melayer.provenance import ModelInfo, describe, versions
from melayer.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from melayer.trainers import Progress, Run

Method = training_data.Method
Reference = Literal["masked", "plain"]
Data = "str | Path | Dataset | Sequence[dict[str, Any]]"
Reward = Callable[..., list[float]]

FILE = "melayer_tune.json"
"""What a run says of itself: written when it begins, and whole when it is finished."""
LOG = "log.jsonl"
REWARD_WEIGHTS = (1.0, 0.2)
"""Of correctness and of the format, unless told otherwise."""
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class TuneResult:
    """What a run did. The model is in `out`: `melayer.load(result.out)` brings it back with its mask."""

    method: Method
    out: str
    model: ModelInfo
    """The model that training began with."""
    mask: WeMask | None
    reference: Reference | None
    """How the reference model was treated; None where the method, or beta = 0, needs none."""
    adapter: bool
    """Whether `out` holds a LoRA adapter, and not all weights."""
    steps: int
    first: Mapping[str, float]
    """The figures of the first logged step."""
    last: Mapping[str, float]
    """The figures of the last logged step."""
    validation: tuple[Mapping[str, float], ...]
    """The figures of each evaluation, in order, with its `step`."""
    resumed_from: int | None
    """The step of the checkpoint that the run went on from."""
    seconds: float
    """Of this call; a run that went on took longer in all."""
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        key = "reward" if self.method == "grpo" else "loss"
        under = "without a mask" if self.mask is None else f"under a mask ({self.mask.selector} {self.mask.rate:g})"
        start, end = self.first.get(key), self.last.get(key)
        if start is None or end is None:
            return f"{self.steps} steps of {self.method} {under}."
        return f"{self.steps} steps of {self.method} {under}: the {key} went from {start:.4g} to {end:.4g}."

    def history(self) -> list[dict[str, Any]]:
        """Each line of the log: `step`, and what the trainer measured there."""
        return read_log(Path(self.out))


def sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Dataset | Sequence[dict[str, Any]],
    *,
    out: str | Path,
    mask: WeMask | None = None,
    lora: bool | Mapping[str, Any] | LoraConfig = False,
    config: Mapping[str, Any] | str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    validation: float | str | Path | Dataset | Sequence[dict[str, Any]] | None = None,
    limit: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    seed: int = 0,
    resume: bool = False,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Supervised fine-tuning on answers, chats or texts, under the mask.

    Args:
        model: A causal language model from transformers. **Its weights are trained in place**; with `lora` they are
            bit-identical afterwards, and the adapter is in `out`. No hook remains on it, also after an exception.
        tokenizer: The model's; it is not changed.
        data: A .jsonl, .json, .parquet or .csv file (also .gz), a hub id, a `datasets.Dataset` or a list of dicts.
        out: A directory for the model, its mask, checkpoints, the log and a page. It is made if it is missing.
        mask: Active in every forward pass of the policy: in training and in evaluation.
        lora: Train an adapter: True for rank 16 on all linear layers, or fields of `peft.LoraConfig`.
        config: Options of `trl.SFTConfig`, or a YAML file with them.
        columns: Which column plays which part, as {"prompt": "question", "response": "answer"}.
        validation: A share of the rows, or other rows: evaluated at the start, every 100 steps and at the end.
        limit: Take only the first rows of the data.
        chat: Whether strings are put into the chat template; None: where there is one.
        system: A system prompt for prompts that are strings.
        seed: Of everything random.
        resume: Go on from the newest checkpoint in `out`.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model; an adapter is loaded onto the model of that name.
        progress: Called with the steps done, the steps in all and the figures of the last step.

    Raises:
        InputError: Data, options or mask do not fit, or `out` holds another run.
        OutputError: `out` cannot be written; the last checkpoint is good.
        TrainingError: The loss is no longer a number; the last checkpoint is good.

    Example:
        >>> melayer.sft(model, tokenizer, "train.jsonl", mask=mask, out="tuned").sentence  # doctest: +SKIP
    """
    asked = _Asked("sft", Path(out), mask, lora, config, seed, resume, parts, name, progress)
    rows: dict[str, Any] = {"columns": columns, "validation": validation, "limit": limit}
    return _tune(model, tokenizer, data, asked, {**rows, "chat": chat, "system": system})


def dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Dataset | Sequence[dict[str, Any]],
    *,
    out: str | Path,
    mask: WeMask | None = None,
    reference: Reference = "masked",
    lora: bool | Mapping[str, Any] | LoraConfig = False,
    config: Mapping[str, Any] | str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    validation: float | str | Path | Dataset | Sequence[dict[str, Any]] | None = None,
    limit: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    seed: int = 0,
    resume: bool = False,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Preference optimisation on pairs of a chosen and a rejected answer, under the mask. See `sft`.

    Args:
        model: As for `sft`; without `lora` a copy of it is the reference.
        tokenizer: The model's.
        data: Pairs: prompt, chosen and rejected, as strings or messages; or two whole dialogues.
        out: A directory.
        mask: Active in every forward pass of the policy.
        reference: `masked`: the reference runs under the mask too, so that the first margin is 0. `plain`: it does
            not, and what the mask changes counts as a difference that training is to make or undo.
        lora: Train an adapter.
        config: Options of `trl.DPOConfig`, or a YAML file with them.
        columns: Which column plays which part.
        validation: A share of the rows, or other rows.
        limit: Take only the first rows.
        chat: Whether strings are put into the chat template.
        system: A system prompt for prompts that are strings.
        seed: Of everything random.
        resume: Go on from the newest checkpoint in `out`.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model.
        progress: As for `sft`.

    Raises:
        InputError: Data, options or mask do not fit, or `out` holds another run.
        OutputError: `out` cannot be written.
        TrainingError: The loss is no longer a number.

    Example:
        >>> melayer.dpo(model, tokenizer, "pairs.jsonl", mask=mask, out="tuned").first["rewards/margins"]  # doctest: +SKIP
    """
    asked = _Asked("dpo", Path(out), mask, lora, config, seed, resume, parts, name, progress, reference)
    rows: dict[str, Any] = {"columns": columns, "validation": validation, "limit": limit}
    return _tune(model, tokenizer, data, asked, {**rows, "chat": chat, "system": system})


def grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Dataset | Sequence[dict[str, Any]],
    *,
    out: str | Path,
    mask: WeMask | None = None,
    reference: Reference = "masked",
    rewards: Sequence[Reward] | None = None,
    instruction: str | None = None,
    lora: bool | Mapping[str, Any] | LoraConfig = False,
    config: Mapping[str, Any] | str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    validation: float | str | Path | Dataset | Sequence[dict[str, Any]] | None = None,
    limit: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    seed: int = 0,
    resume: bool = False,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Reinforcement learning on problems whose answer can be checked, under the mask. See `sft`.

    Args:
        model: As for `sft`; without `lora`, and with beta above 0, a copy of it is the reference.
        tokenizer: The model's.
        data: Problems with their answer; of GSM8K's solutions the part after `####` counts.
        out: A directory.
        mask: Active in every forward pass of the policy, roll-outs included.
        reference: As for `dpo`: `masked` makes the first KL 0. Without beta there is no reference.
        rewards: Functions of `completions` and of the rows' columns (`gold`); by default `rewards.correctness` and
            `rewards.answer_format`, weighted 1 and 0.2 (`reward_weights`).
        instruction: What each prompt ends with; by default what the format reward looks for.
        lora: Train an adapter.
        config: Options of `trl.GRPOConfig`, or a YAML file with them.
        columns: Which column plays which part.
        validation: A share of the rows, or other rows.
        limit: Take only the first rows.
        chat: Whether strings are put into the chat template.
        system: A system prompt for prompts that are strings.
        seed: Of everything random.
        resume: Go on from the newest checkpoint in `out`.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model.
        progress: As for `sft`.

    Raises:
        InputError: Data, options or mask do not fit, or `out` holds another run.
        OutputError: `out` cannot be written.
        TrainingError: The loss is no longer a number.

    Example:
        >>> melayer.grpo(model, tokenizer, "train.jsonl", mask=mask, out="tuned").last["reward"]  # doctest: +SKIP
    """
    asked = _Asked("grpo", Path(out), mask, lora, config, seed, resume, parts, name, progress, reference, rewards)
    rows: dict[str, Any] = {"columns": columns, "validation": validation, "limit": limit}
    return _tune(model, tokenizer, data, asked, {**rows, "chat": chat, "system": system, "instruction": instruction})


def read_log(out: Path) -> list[dict[str, Any]]:
    """Each whole line of a run's log; none where there is no log."""
    return [json.loads(line) for line in jsonl.whole_lines(out / LOG)]


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


# --- one run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Asked:
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


def _tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    asked: _Asked,
    row_options: dict[str, Any],
) -> TuneResult:
    check_installed()
    if asked.reference not in get_args(Reference):
        raise InputError(f"reference is {asked.reference!r}; expected one of {', '.join(get_args(Reference))}.")
    started = time.monotonic()
    decoder = free(model, asked.parts)
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
    prepared = training_data.prepare(
        asked.method,
        data,
        tokenizer,
        **row_options,
        max_length=_longest(config, decoder.max_positions),
        seed=asked.seed,
    )
    needs_reference = asked.method == "dpo" or (asked.method == "grpo" and config.beta != 0)
    adapter = _adapter(asked.lora)
    settings = {
        "method": asked.method,
        "model": info.to_dict(),
        "mask": None if mask is None else asdict(mask),
        "reference": asked.reference if needs_reference else None,
        "lora": None if adapter is None else _plain(adapter.to_dict()),
        "data": prepared.to_dict(),
        "config": training_config.recorded(config),
        "processes": config.world_size,
        "rewards": _reward_names(asked) if asked.method == "grpo" else None,
        "layers_counted_from": 0,
    }
    notes = [*prepared.notes, *_stated(asked, mask, adapter is not None, config, needs_reference)]
    for note in prepared.notes:
        warnings.warn(note, MelayerWarning, stacklevel=3)
    main = config.process_index == 0
    with config.main_process_first(desc="opening the run"):
        checkpoint = _opened(asked, settings, write=main)
    from melayer.trainers import Run

    run = Run(asked.out, mask, asked.reference, asked.progress)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_given_back(model))
        reference = copy.deepcopy(model) if needs_reference and adapter is None else None
        if mask is not None:
            stack.enter_context(mask.apply(model, parts=asked.parts, when=_policy_runs(model, asked, adapter)))
            if reference is not None and asked.reference == "masked":
                stack.enter_context(mask.apply(reference, parts=asked.parts))
        trainer = _trainer(model, copy.deepcopy(tokenizer), prepared, asked, config, adapter, reference, run)
        if adapter is not None:
            stack.callback(_unwrapped, trainer, model)
            # What the adapter is loaded onto, wherever that is: not the directory that it was loaded from today.
            trainer.model.peft_config["default"].base_model_name_or_path = info.name
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1]))
        if prepared.validation is not None and trainer.state.global_step % trainer.state.eval_steps:
            trainer.evaluate()
        _save(trainer, asked, mask)
        steps = int(trainer.state.global_step)
    history = read_log(asked.out)
    trained = [line for line in history if not any(key.startswith("eval_") for key in line)]
    result = TuneResult(
        method=asked.method,
        out=str(asked.out),
        model=info,
        mask=mask,
        reference=asked.reference if needs_reference else None,
        adapter=adapter is not None,
        steps=steps,
        first=trained[0] if trained else {},
        last=trained[-1] if trained else {},
        validation=tuple(line for line in history if any(key.startswith("eval_") for key in line)),
        resumed_from=None if checkpoint is None else checkpoint[0],
        seconds=round(time.monotonic() - started, 3),
        settings=settings,
        versions=_versions(),
        notes=tuple(notes),
    )
    if main:
        _record(asked.out, {"status": "finished", **result.to_dict()})
    return result


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


def _policy_runs(model: nn.Module, asked: _Asked, adapter: Any) -> Callable[[], bool] | None:
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


def _reward_names(asked: _Asked) -> list[str]:
    return [getattr(reward, "__name__", type(reward).__name__) for reward in _rewards(asked)]


def _rewards(asked: _Asked) -> list[Reward]:
    from melayer.rewards import answer_format, correctness

    return [correctness, answer_format] if asked.rewards is None else list(asked.rewards)


def _stated(asked: _Asked, mask: WeMask | None, adapter: bool, config: Any, needs_reference: bool) -> list[str]:
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
    asked: _Asked,
    config: Any,
    adapter: Any,
    reference: Any,
    run: Run,
) -> Any:
    from melayer import trainers

    shared: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": prepared.rows,
        "eval_dataset": prepared.validation,
        "processing_class": tokenizer,
        "peft_config": adapter,
        "run": run,
    }
    try:
        if asked.method == "sft":
            if prepared.assistant_only and "assistant_only_loss" not in _given(asked):
                config.assistant_only_loss = True
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


def _given(asked: _Asked) -> Mapping[str, Any]:
    if isinstance(asked.config, (str, Path)):
        return training_config.read(Path(asked.config))
    return asked.config or {}


@contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries have to say to each other about renamed options is kept from the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate)\b")
        yield


# --- the model that was handed in -----------------------------------------------------------------------------------


@contextmanager
def _given_back(model: PreTrainedModel) -> Iterator[None]:
    """After training the model has its own forward, config and modes again; only its weights may be others."""
    config, generation = copy.deepcopy(model.config), copy.deepcopy(getattr(model, "generation_config", None))
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    dropout = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    training = [module for module in model.modules() if module.training]
    checkpointing = {
        module: {key: vars(module).get(key) for key in ("gradient_checkpointing", "_gradient_checkpointing_func")}
        for module in model.modules()
        if "gradient_checkpointing" in vars(module)
    }
    forward = vars(model).get("forward")
    try:
        yield
    finally:
        if forward is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = forward
        disable = getattr(model, "disable_input_require_grads", None)
        if disable is not None and getattr(model, "_require_grads_hooks", None):
            disable()
        model.config = config
        if generation is not None:
            model.generation_config = generation
        for name, parameter in model.named_parameters():
            parameter.requires_grad = grads.get(name, parameter.requires_grad)
            parameter.grad = None
        for module, p in dropout.items():
            module.p = p
        for module, values in checkpointing.items():
            for key, value in values.items():
                if value is None:
                    vars(module).pop(key, None)
                else:
                    vars(module)[key] = value
        model.eval()
        for module in training:
            module.training = True


def _unwrapped(trainer: Any, model: nn.Module) -> None:
    """Takes the adapter out of the model again: it is in the run's directory."""
    wrapped = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(wrapped, "unload"):
        wrapped.unload()
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


# --- the run's directory --------------------------------------------------------------------------------------------


def _opened(asked: _Asked, settings: dict[str, Any], *, write: bool) -> tuple[int, Path] | None:
    """The checkpoint to go on from, if any; a new run writes down what it is.

    Raises:
        InputError: The directory holds another run, or there is nothing to go on from.
        OutputError: It cannot be written.
    """
    out, path = asked.out, asked.out / FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OutputError(f"Nothing can be written to {out}: {error.strerror}. Give another directory.") from error
    there = None
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}. Give another directory.") from error
    if not asked.resume:
        return _begun(asked, settings, there, write=write)
    if there is None:
        raise InputError(f"There is no run in {out} to go on with. Leave resume (--resume) out.")
    if there.get("status") == "finished":
        raise InputError(f"The run in {out} is finished. Load it with melayer.load({str(out)!r}).")
    differing = _differing(there["settings"], settings)
    if differing:
        raise InputError(
            f"The run in {out} was started with other settings: {', '.join(differing)}. Go on with the same, or begin "
            "a new run in another directory."
        )
    found = checkpoints.last(out)
    if found is not None and not (found[1] / "scheduler.pt").exists():
        raise InputError(f"{found[1]} holds weights only (save_only_model), so the run cannot go on from it exactly.")
    if write:
        step = 0 if found is None else found[0]
        with jsonl.keeping("log", out / LOG):
            # What was logged after the checkpoint will come again.
            jsonl.replace(out / LOG, (line for line in read_log(out) if line["step"] <= step))
    return found


def _begun(asked: _Asked, settings: dict[str, Any], there: Any, *, write: bool) -> None:
    if not write:
        return
    if there is not None:
        how = "and finished" if there.get("status") == "finished" else "that was stopped; go on with --resume"
        raise InputError(f"{asked.out} holds a run already, {how}. Give another directory with --out.")
    if (asked.out / "config.json").exists() or (asked.out / "adapter_config.json").exists():
        raise InputError(f"{asked.out} holds a model. Give another directory with --out.")
    _record(asked.out, {"melayer_version": __version__, "status": "running", "settings": settings})


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> list[str]:
    """The settings that are not the same, by their names."""
    now = json.loads(json.dumps(now))
    found = []
    for key in sorted({*before, *now}):
        left, right = before.get(key), now.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differing(left, right, f"{under}{key}.")
        elif left != right:
            found.append(
                f"{under}{key}" if isinstance(left or right, (dict, list)) else f"{under}{key} {left} → {right}"
            )
    return found


def _save(trainer: Any, asked: _Asked, mask: WeMask | None) -> None:
    """The trained model, its tokenizer and its mask, moved into place once all of it is written."""
    from melayer.trainers import is_sharded, saved_mask

    sharded = is_sharded(trainer)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    main = trainer.args.should_save
    with checkpoints.writing("The trained model", asked.out):
        staging = checkpoints.clear(asked.out) if main else asked.out / checkpoints.STAGING
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(staging))
        if main:
            # A pickle with this machine's paths, and PEFT's card: the run's own files say what was done.
            for extra in ("training_args.bin", "README.md"):
                (staging / extra).unlink(missing_ok=True)
            if mask is not None:
                saved_mask(mask, trainer.model, sharded=sharded).save(staging)
            weights = "config.json" if (staging / "config.json").exists() else "adapter_config.json"
            checkpoints.publish_files(staging, asked.out, weights)
            staging.rmdir()
    trainer.accelerator.wait_for_everyone()


def _record(out: Path, values: dict[str, Any]) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".melayer-") as temporary:
            written = Path(temporary) / FILE
            written.write_text(json.dumps(_plain(values), ensure_ascii=False, indent=1), encoding="utf-8")
            written.replace(out / FILE)
    except OSError as error:
        raise OutputError(f"The run cannot be recorded in {out}: {error.strerror}. Make room there.") from error


def _plain(values: Any) -> Any:
    """Values that JSON can hold; sets, which adapters' configs have, in order."""
    if isinstance(values, Mapping):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, (set, frozenset)):
        return sorted(map(_plain, values))
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return values if isinstance(values, (str, int, float, bool, type(None))) else str(values)


def _versions() -> dict[str, str]:
    found = versions()
    return {**found, **{name: version(name) for name in ("trl", "peft", "accelerate", "datasets", "math-verify")}}
