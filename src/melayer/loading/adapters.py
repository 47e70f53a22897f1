"""A directory with a LoRA adapter: which model it belongs to, and the two of them as one model."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import MelayerWarning, ModelError, border
from melayer.loading.files import CONFIG, INDEX, PICKLE, PICKLE_INDEX, SINGLE, headers, require_own
from melayer.loading.hub import ADAPTER as FILE
from melayer.loading.hub import ADAPTER_PICKLE, ADAPTER_WEIGHTS
from melayer.model.provenance import fingerprint
from melayer.runs import atomic, records

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUN_FILE = "melayer_tune.json"
"""What a training run says of itself, in its directory."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_MEND = "Download or copy the adapter again."


@dataclass(frozen=True)
class Adapter:
    """What a directory says of the adapter in it; who wrote it may have said anything."""

    directory: Path
    base: str | None
    """The name of the model that it was trained on, as it was given then."""
    revision: str | None
    """Of that model, where it is on the hub."""
    fingerprint: str | None
    """Of that model's weights, where melayer trained the adapter."""


@dataclass(frozen=True)
class _Config:
    """What of an adapter's config is read here; the rest is peft's."""

    peft_type: str = ""
    base_model_name_or_path: str | None = None
    revision: str | None = None
    megatron_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Model:
    name: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class _Settings:
    model: _Model = _Model()


@dataclass(frozen=True)
class _Record:
    """What of a run's record is read here."""

    settings: _Settings = _Settings()


def find(directory: str | Path) -> Adapter | None:
    """The adapter in a directory; None where there is none.

    Raises:
        ModelError: Its config or its run's record cannot be read, or a whole model lies beside it.
    """
    directory = Path(directory)
    with border(f"The directory {directory} cannot be read", "Give one that you may read.", error=ModelError):
        if not (directory / FILE).is_file():
            return None
        require_own(directory)
        whole = [file for file in (SINGLE, INDEX, PICKLE, PICKLE_INDEX) if (directory / file).is_file()]
        # A checkpoint of a run has the run's own record above it; nothing else above a directory is looked at.
        real = directory.resolve()
        places = [real / RUN_FILE, *([real.parent / RUN_FILE] if _CHECKPOINT.fullmatch(real.name) else [])]
        record = next((place for place in places if place.is_file()), None)
    if (directory / CONFIG).is_file() and whole:
        raise ModelError(
            f"{directory} holds a whole model ({whole[0]}) and an adapter ({FILE}), and which of them is meant is not "
            "known. Give each a directory of its own."
        )
    config = _config(directory)
    model = _Model()
    if record is not None:
        model = records.read(record, _Record, f"{record} is no record of a run", _MEND, ModelError).settings.model
    return Adapter(directory, model.name or config.base_model_name_or_path, config.revision, model.fingerprint)


def weights(adapter: Adapter, allow_pickle: bool) -> Path:
    """The file of an adapter's weights.

    Raises:
        ModelError: There is none, it is damaged, or it is a pickle, and these may not be read.
    """
    file, pickle = adapter.directory / ADAPTER_WEIGHTS, adapter.directory / ADAPTER_PICKLE
    if file.is_file():
        headers([file])
        return file
    if not pickle.is_file():
        raise ModelError(f"The adapter in {adapter.directory} has no weights: expected {ADAPTER_WEIGHTS}. {_MEND}")
    if not allow_pickle:
        raise ModelError(
            f"The weights of the adapter in {adapter.directory} are a pickle ({ADAPTER_PICKLE}), and reading a pickle "
            "can run any code that is in it. If you trust its author, pass --allow-pickle (allow_pickle=True); safer: "
            "safetensors."
        )
    return pickle


def name_base(directory: Path, name: str) -> None:
    """Writes the base's name into an adapter's config, in place of where it was loaded from on this machine."""
    path = directory / FILE
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        atomic.write_text(path, json.dumps({**values, "base_model_name_or_path": name}, indent=2), own=True)


def merged(model: PreTrainedModel, adapter: Adapter, base: str) -> PreTrainedModel:
    """The model with the adapter's product added to its weights: a model like any other.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit, lacks weights or has some too many.

    Warns:
        MelayerWarning: The weights are not those that the adapter was trained on.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelError(
            f"{adapter.directory} holds an adapter, and peft is not installed. Get it with: pip install 'melayer[tune]'"
        ) from error
    _require_mergeable(adapter)
    if adapter.fingerprint is not None and (found := fingerprint(model)) != adapter.fingerprint:
        warnings.warn(
            f"The adapter in {adapter.directory} was trained on weights with fingerprint {adapter.fingerprint}; those "
            f"of {base} have {found}. Name the right ones with base= (--base).",
            MelayerWarning,
            stacklevel=4,
        )
    todo = "Name the model that it was trained on with base= (--base)."
    with (
        border(f"The adapter in {adapter.directory} does not fit {base}", todo, error=ModelError),
        warnings.catch_warnings(),
    ):
        # Between peft and transformers, and of what is looked at here; and the base was named by us and is at hand.
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(str(adapter.directory))
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ModelError(
                f"The adapter in {adapter.directory} is of kind {config.peft_type.value}, which changes no weights and "
                "cannot be merged. melayer reads LoRA and its like."
            )
        # Without memory for what is to be loaded: a config can ask for any rank.
        adapted: Any = PeftModel.from_pretrained(model, str(adapter.directory), config=config, low_cpu_mem_usage=True)
        # Once more for what it says: which weights are missing is a mere warning above, and which are too many nothing.
        result = adapted.load_adapter(str(adapter.directory), "default")
        lacking, unused = sorted(result.missing_keys), sorted(result.unexpected_keys)
        if lacking or unused:
            raise ModelError(
                f"The adapter in {adapter.directory} does not fit {base}: "
                + (f"it lacks {len(lacking)} weights (the first is {lacking[0]}). " if lacking else "")
                + (f"it has {len(unused)} with no place there (the first is {unused[0]}). " if unused else "")
                + todo
            )
        whole: PreTrainedModel = adapted.merge_and_unload()
    for left in ("peft_config", "_hf_peft_config_loaded"):
        vars(whole).pop(left, None)
    return whole


def _require_mergeable(adapter: Adapter) -> None:
    """Raises ModelError where an adapter's config leads to other files or modules."""
    config = _config(adapter.directory)
    if config.peft_type == "XLORA" or config.megatron_config is not None:
        what = "other adapters" if config.peft_type == "XLORA" else "a module of Python (megatron_config)"
        raise ModelError(
            f"The adapter in {adapter.directory} leads to {what}, outside of its directory. melayer reads LoRA and its "
            "like, with all that belongs to them in one directory."
        )


def _config(directory: Path) -> _Config:
    path = directory / FILE
    return records.read(path, _Config, f"{path} cannot be read as an adapter's config", _MEND, ModelError)
