"""A directory with a LoRA adapter: which model it belongs to, and the two of them as one model."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import MelayerWarning, ModelError, first_line
from melayer.model.provenance import fingerprint
from melayer.runs import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "adapter_config.json"
RUN_FILE = "melayer_tune.json"
"""What a training run says of itself, in its directory."""


@dataclass(frozen=True)
class Adapter:
    """What a directory says of the adapter in it."""

    directory: Path
    base: str | None
    """The name of the model that it was trained on, as it was given then."""
    fingerprint: str | None
    """Of that model's weights, where melayer trained the adapter."""


def find(name: str) -> Adapter | None:
    """The adapter in a directory; None where there is none, or a whole model beside it.

    Raises:
        ModelError: Its config cannot be read.
    """
    directory = Path(name).expanduser()
    if not (directory / FILE).is_file() or (directory / "config.json").is_file():
        return None
    values = _read(directory / FILE)
    # A checkpoint of a run has the run's own record above it.
    record = next((place / RUN_FILE for place in (directory, directory.parent) if (place / RUN_FILE).is_file()), None)
    model = {} if record is None else _read(record).get("settings", {}).get("model", {})
    return Adapter(directory, model.get("name") or values.get("base_model_name_or_path"), model.get("fingerprint"))


def name_base(directory: Path, name: str) -> None:
    """Writes the base's name into an adapter's config, in place of where it was loaded from on this machine."""
    path = directory / FILE
    if path.exists():
        atomic.write_text(path, json.dumps({**_read(path), "base_model_name_or_path": name}, indent=2), own=True)


def merged(model: PreTrainedModel, adapter: Adapter, base: str) -> PreTrainedModel:
    """The model with the adapter's product added to its weights: a model like any other.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit.

    Warns:
        MelayerWarning: The weights are not those that the adapter was trained on.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"{adapter.directory} holds an adapter, and peft is not installed. Get it with: pip install 'melayer[tune]'"
        ) from error
    if adapter.fingerprint is not None and (found := fingerprint(model)) != adapter.fingerprint:
        warnings.warn(
            f"The adapter in {adapter.directory} was trained on weights with fingerprint {adapter.fingerprint}; those "
            f"of {base} have {found}. Name the right ones with base= (--base).",
            MelayerWarning,
            stacklevel=4,
        )
    try:
        with warnings.catch_warnings():
            # Between peft and transformers, about names; and the base was named by us and is at hand.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*")
            adapted: Any = PeftModel.from_pretrained(model, str(adapter.directory))
            whole: PreTrainedModel = adapted.merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"The adapter in {adapter.directory} does not fit {base}: {first_line(error)}") from error
    for left in ("peft_config", "_hf_peft_config_loaded"):
        vars(whole).pop(left, None)
    return whole


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is no config: it holds a {type(values).__name__}.")
    return values
