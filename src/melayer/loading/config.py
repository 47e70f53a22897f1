"""A model's config, looked at before transformers builds anything of it, and read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import ModelError, border
from melayer.loading.files import CONFIG
from melayer.loading.reading import reading, require_said

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MEND = f"Mend {CONFIG}, or download the model again."
_LARGEST = 64 << 20
"""Bytes; a config has some kilobytes, one with the labels of a classifier a few million."""
_N_LAYERS = re.compile(r"(^|_)(layers?|blocks|depth)$")
"""What the number of blocks is called: num_hidden_layers, n_layer, decoder_layers, num_blocks."""
_CODE = re.compile(r"(attn|attention|experts)_implementation")
"""What names the kernel that computes a part: with a slash in it, one that is fetched from the hub, and is code."""


def raw_config(name: str, directory: Path) -> dict[str, Any]:
    """What config.json holds.

    Raises:
        ModelError: It is no JSON object.
    """
    path = directory / CONFIG
    with border(f"The config of {name} cannot be read", _MEND, error=ModelError):
        if (size := path.stat().st_size) > _LARGEST:
            raise ModelError(f"{path} has {size:,} bytes; expected a config of some kilobytes. {_MEND}")
        values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise ModelError(f"The config of {name} cannot be read: it holds a {type(values).__name__}. {_MEND}")
    return values


def named_weights(name: str, directory: Path) -> str | None:
    """The file of weights that a config names in place of the usual ones; None for these.

    Raises:
        ModelError: It is no JSON object, or names something else.
    """
    named = raw_config(name, directory).get("transformers_weights")
    if named is not None and not (
        isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ModelError(f"{directory / CONFIG} names {named!r} as its weights; expected a safetensors file. {_MEND}")
    return named


def read_config(
    name: str, directory: Path, *, trust_remote_code: bool, n_tensors: int | None = None
) -> PreTrainedConfig:
    """The config of a causal decoder.

    Args:
        name: What the model is called in messages.
        directory: Where it is.
        trust_remote_code: Whether its own code may run.
        n_tensors: How many tensors the weights have, where that is known.

    Raises:
        ModelError: It cannot be read, does not fit the weights, or is not of a causal decoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    require_said(trust_remote_code)
    values = raw_config(name, directory)
    with border(f"The config of {name} cannot be read", _MEND, error=ModelError):
        _require_plausible(name, values, n_tensors, trust_remote_code)
    with reading(name, "config", _MEND):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
        quantised = getattr(config, "quantization_config", None)
        known = quantised is None or AutoHfQuantizer.supports_quant_method(
            quantised if isinstance(quantised, dict) else quantised.to_dict()
        )
        config.to_dict()  # what saving, printing and copying a config needs
    if not known:
        raise ModelError(f"The config of {name} says that its weights are quantised in an unknown way. {_MEND}")
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(n_layers, int) and n_layers < 1:
        raise ModelError(f"The config of {name} says that the model has {n_layers} blocks. {_MEND}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model ({config.model_type}). melayer measures causal decoders; "
            "give one of those."
        )
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise ModelError(
            f"{name} ({config.model_type}) is not a causal language model: transformers has no "
            "AutoModelForCausalLM for it. melayer measures causal decoders; give one of those."
        )
    return config


def _require_plausible(name: str, values: dict[str, Any], n_tensors: int | None, trust_remote_code: bool) -> None:
    for key, value in _entries(values):
        if _CODE.search(key) and not trust_remote_code and any("/" in str(part) for part in _leaves(value)):
            raise ModelError(
                f"The config of {name} asks for {value!r} as its {key}, which is code from the hub. If you trust its "
                "author, pass --trust-remote-code (trust_remote_code=True)."
            )
        n_layers = value if isinstance(value, int) and _N_LAYERS.search(key) else 0
        if n_tensors is not None and n_layers > n_tensors:
            # Built block by block before a weight is looked for, which takes minutes, or all the memory.
            raise ModelError(
                f"The config of {name} says {key} = {n_layers:,}, and the weights have {n_tensors:,} tensors, less "
                f"than one for each. {_MEND}"
            )


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at whatever depth."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield str(key), inner
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a value that may hold others."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, (dict, list)):
            waiting += inner.values() if isinstance(inner, dict) else inner
        else:
            yield inner
