"""Fine-tuning with the mask on: SFT, DPO and GRPO through TRL, the mask active wherever the policy runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.interventions.mask import WeMask
from melayer.tuning import run as training
from melayer.tuning.data import RowOptions
from melayer.tuning.job import TrainingJob
from melayer.tuning.report import write_tune_report
from melayer.tuning.result import Reference, Reward, TrainingProgress, TuneResult

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TuneResult", "dpo", "grpo", "sft"]


def sft(  # noqa: PLR0913 - public: all that a run is asked for
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
    progress: TrainingProgress | None = None,
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
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model; an adapter is loaded onto the model of that name.
        progress: Called with the steps done, the steps in all and the figures of the last step.

    Raises:
        InputError: Data, options or mask do not fit, or `out` holds another run.
        OutputError: `out` cannot be written; the last checkpoint is good.
        TrainingError: The loss is no longer a number; the last checkpoint is good.

    Example:
        >>> melayer.sft(model, tokenizer, "train.jsonl", mask=mask, out="tuned").sentence  # doctest: +SKIP
    """
    job = TrainingJob(
        method="sft",
        out=Path(out),
        mask=mask,
        lora=lora,
        config=config,
        seed=seed,
        resume=resume,
        parts=parts,
        name=name,
        progress=progress,
    )
    rows = RowOptions(columns, validation, limit, chat, system)
    return _tuned(model, tokenizer, data, job, rows)


def dpo(  # noqa: PLR0913 - public: all that a run is asked for
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
    progress: TrainingProgress | None = None,
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
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model.
        progress: As for `sft`.

    Raises:
        InputError: Data, options or mask do not fit, or `out` holds another run.
        OutputError: `out` cannot be written.
        TrainingError: The loss is no longer a number.

    Example:
        >>> melayer.dpo(model, tokenizer, "pairs.jsonl", mask=mask, out="tuned").sentence  # doctest: +SKIP
    """
    job = TrainingJob(
        method="dpo",
        out=Path(out),
        mask=mask,
        lora=lora,
        config=config,
        seed=seed,
        resume=resume,
        parts=parts,
        name=name,
        progress=progress,
        reference=reference,
    )
    rows = RowOptions(columns, validation, limit, chat, system)
    return _tuned(model, tokenizer, data, job, rows)


def grpo(  # noqa: PLR0913 - public: all that a run is asked for
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
    progress: TrainingProgress | None = None,
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
        parts: Names of parts that `wiring.read` does not find by itself.
        name: What to call the model.
        progress: As for `sft`.

    Raises:
        InputError: Data, options or mask do not fit, or `out` holds another run.
        OutputError: `out` cannot be written.
        TrainingError: The loss is no longer a number.

    Example:
        >>> melayer.grpo(model, tokenizer, "train.jsonl", mask=mask, out="tuned").last["reward"]  # doctest: +SKIP
    """
    job = TrainingJob(
        method="grpo",
        out=Path(out),
        mask=mask,
        lora=lora,
        config=config,
        seed=seed,
        resume=resume,
        parts=parts,
        name=name,
        progress=progress,
        reference=reference,
        rewards=rewards,
    )
    rows = RowOptions(columns, validation, limit, chat, system, instruction)
    return _tuned(model, tokenizer, data, job, rows)


def _tuned(model: Any, tokenizer: Any, data: Any, job: TrainingJob, rows: RowOptions) -> TuneResult:
    result = training.run(model, tokenizer, data, job, rows)
    from accelerate import PartialState

    if PartialState().is_main_process:
        write_tune_report(result, result.history())
    return result
