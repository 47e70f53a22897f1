"""All that is decided about a run before anything is changed: the mask, the options, the rows, the reference."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import InputError, MelayerWarning, border, reason
from melayer.interventions.mask import WeMask
from melayer.model.forward import embedding_weight
from melayer.model.subject import Subject
from melayer.tuning import config as training_config
from melayer.tuning import data as training_data
from melayer.tuning import run_directory
from melayer.tuning.data import Prepared, RowOptions
from melayer.tuning.job import TrainingJob
from melayer.tuning.result import Reference
from melayer.tuning.settings import TuneSettings

if TYPE_CHECKING:
    from peft import LoraConfig

REWARD_WEIGHTS = (1.0, 0.2)
"""Of correctness and of the format, unless told otherwise."""
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True, eq=False)
class Plan:
    """A run as it will be."""

    job: TrainingJob
    subject: Subject
    mask: WeMask | None
    """With its blocks and dimensions written down."""
    config: Any
    """TRL's options."""
    prepared: Prepared
    adapter: LoraConfig | None
    reference: Reference | None
    """How the reference model is treated; None where there is none."""
    settings: TuneSettings
    notes: tuple[str, ...]


def planned(subject: Subject, data: Any, job: TrainingJob, row_options: RowOptions) -> Plan:
    """What the job comes to on this model and these rows.

    Raises:
        InputError: Data, options or mask do not fit.

    Warns:
        MelayerWarning: Rows are left out.
    """
    mask = None if job.mask is None else job.mask.fixed(subject.decoder)
    given = training_config.read(Path(job.config)) if isinstance(job.config, (str, Path)) else job.config or {}
    given = training_config.check(job.method, given, masked=mask is not None)
    training_config.check(job.method, {"seed": job.seed}, masked=False)
    config = training_config.resolve(
        job.method,
        given,
        out=job.out,
        seed=job.seed,
        validates=row_options.validation is not None,
        max_positions=subject.decoder.max_positions,
    )
    if job.method == "grpo" and config.reward_weights is None and job.rewards is None:
        config.reward_weights = list(REWARD_WEIGHTS)
    _check_template(getattr(config, "chat_template_path", None))
    prepared = training_data.prepare(
        job.method,
        data,
        subject.tokenizer,
        row_options,
        max_length=_longest(config, subject.decoder.max_positions),
        seed=job.seed,
        vocabulary=embedding_weight(subject.model).shape[0],
    )
    for note in prepared.notes:
        warnings.warn(note, MelayerWarning, stacklevel=5)
    if prepared.assistant_only and "assistant_only_loss" not in given:
        config.assistant_only_loss = True
    needs_reference = job.method == "dpo" or (job.method == "grpo" and config.beta != 0)
    reference = job.reference if needs_reference else None
    adapter = _adapter(job.lora)
    settings: TuneSettings = {
        "method": job.method,
        "model": subject.info.to_dict(),
        "mask": None if mask is None else asdict(mask),
        "reference": reference,
        "lora": None if adapter is None else run_directory.plain(adapter.to_dict()),
        "data": prepared.to_dict(),
        "config": training_config.recorded(config),
        "processes": config.world_size,
        "rewards": job.reward_names if job.method == "grpo" else None,
        "layers_counted_from": 0,
    }
    notes = (*prepared.notes, *_choices(job, masked=mask is not None, adapted=adapter is not None, reference=reference))
    return Plan(job, subject, mask, config, prepared, adapter, reference, settings, notes)


def _check_template(source: str | None) -> None:
    """TRL takes a template from a tokenizer, and would ask at the terminal whether to run the code that one brings."""
    if source is None or source.endswith((".jinja", ".j2")):
        return
    from transformers import AutoTokenizer

    with border(f"chat_template_path {source!r} gives no template", "Name a .jinja file, or a tokenizer without code."):
        AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _longest(config: Any, max_positions: int | None) -> int | None:
    """Tokens that a row may have; of GRPO's rows, the prompt."""
    max_length: int | None = getattr(config, "max_length", None)
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
    if max_length is not None and max_positions is not None and max_length > max_positions:
        raise InputError(
            f"max_length is {max_length}, but the model has {max_positions} positions. Give at most as many."
        )
    return max_positions if max_length is None else max_length


def _adapter(lora: bool | Mapping[str, Any] | LoraConfig) -> LoraConfig | None:
    """The adapter's config; None without one."""
    from peft import LoraConfig

    if lora is False:
        return None
    if isinstance(lora, LoraConfig):
        return copy.deepcopy(lora)
    try:
        return LoraConfig(**{**_LORA, **({} if lora is True else lora)})
    except Exception as error:
        raise InputError(
            f"peft refuses the LoRA options: {reason(error)}. See the fields of peft.LoraConfig."
        ) from error


def _choices(job: TrainingJob, *, masked: bool, adapted: bool, reference: Reference | None) -> list[str]:
    """What was chosen and cannot be seen in the figures."""
    said = []
    if masked:
        where = "in training, evaluation and roll-outs" if job.method == "grpo" else "in training and evaluation"
        said.append(f"The mask is on wherever the policy runs: {where}. Its dimensions are those of the first step.")
    if job.method == "grpo" and reference is None:
        said.append("beta is 0, so there is no reference model and no KL.")
    elif reference is not None:
        kind = "the model without its adapter" if adapted else "a copy of the first weights"
        treated = "" if not masked else ", masked as the policy is" if reference == "masked" else ", not masked"
        said.append(f"The reference is {kind}{treated}.")
    return said
