"""A name becomes a model that runs as it was saved: with its adapter, and under its mask."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from melayer.errors import MelayerWarning, ModelError
from melayer.interventions.mask import WeMask
from melayer.loading import adapters, hub
from melayer.loading.checkpoint import (
    DTypeName,
    check_directory,
    device_of,
    dtype_of,
    placement,
    read_config,
    read_model,
    read_tokenizer,
)
from melayer.loading.source import MASK_FILE, Source, find
from melayer.model.provenance import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """What `load` returns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask: WeMask | None = None
    """The mask that was saved with the model, and is applied to it; None unless there is one."""


def load(  # noqa: PLR0913 - what there is to say about how a model is loaded
    name: str,
    *,
    dtype: DTypeName = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, str] | None = None,
    offload_folder: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    mask: bool = True,
    base: str | None = None,
) -> Loaded:
    """The model and the tokenizer that `name` stands for, ready to run.

    A directory with an adapter stands for the model that it was trained on, with the adapter merged into its weights.

    A mask that was saved with the model is applied to it for good: WeMask.detach(model) takes it off.

    Args:
        name: `demo`, a local directory, a `.gguf` file, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        dtype: `auto` keeps the checkpoint's own; a GGUF file is unpacked to float32.
        device: `auto` takes CUDA, else MPS, else the CPU. Ignored with `device_map`.
        device_map: Passed to `from_pretrained`, for models that need several devices.
        max_memory: The same, with `device_map`: what each device may hold; what is too much goes to the CPU or the
            disk.
        offload_folder: The same: where weights go that fit nowhere else.
        allow_pickle: Read `.bin` checkpoints too. Unpickling runs code from the file.
        trust_remote_code: Run the modelling code that comes with the checkpoint.
        revision: Branch, tag or commit on the hub.
        mask: Apply the mask that was saved with the model, where there is one.
        base: The model that an adapter belongs to, where it is not to be had under the name it had in training.

    Raises:
        InputError: The saved mask is corrupt, or does not fit the model.
        ModelError: The model cannot be found, read or trusted; the message says what to do.

    Warns:
        MelayerWarning: A mask was saved with the model, and is applied.

    Example:
        >>> model, tokenizer, mask = melayer.load("demo")  # doctest: +SKIP
    """
    adapter = adapters.find(name)
    if adapter is not None:
        options: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
        options |= {
            "allow_pickle": allow_pickle,
            "max_memory": max_memory,
            "offload_folder": offload_folder,
        }
        options |= {"trust_remote_code": trust_remote_code, "revision": revision}
        return _with_adapter(name, adapter, base, mask, options)
    if base is not None:
        raise ModelError(f"A base was given ({base}), but {name} is no directory with an adapter. Leave it out.")
    source = find(name)
    spread = placement(device_map, max_memory, offload_folder)
    target = None if spread else device_of(device)
    if source.is_local:
        check_directory(Path(source.location), allow_pickle)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = read_config(source, options)
    model = read_model(source, config, dtype_of(dtype), spread, allow_pickle, options)
    tokenizer = read_tokenizer(source, options)
    module: nn.Module = model  # whose methods have types, which PreTrainedModel's have not
    if target is not None:
        module.to(target)
    module.eval()
    return Loaded(model, tokenizer, _saved_mask(source, model, revision) if mask else None)


def _with_adapter(
    name: str, adapter: adapters.Adapter, base: str | None, mask: bool, options: dict[str, Any]
) -> Loaded:
    """The adapter's base with the adapter merged, its tokenizer and its mask."""
    base = base or adapter.base
    if base is None:
        raise ModelError(f"The adapter in {name} does not say what it was trained on. Name it with base= (--base).")
    try:
        loaded = load(base, mask=False, **options)
    except ModelError as error:
        raise ModelError(
            f"{name} holds an adapter for {base}, which cannot be loaded: {error} Name its place with base= (--base)."
        ) from error
    model = adapters.merged(loaded.model, adapter, base)
    module: nn.Module = model
    module.eval()
    source = Source(name, str(adapter.directory))
    own = (adapter.directory / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(source, {}) if own else loaded.tokenizer
    return Loaded(model, tokenizer, _saved_mask(source, model, None, merged=True) if mask else None)


def _saved_mask(source: Source, model: PreTrainedModel, revision: str | None, *, merged: bool = False) -> WeMask | None:
    """The mask beside the weights, applied."""
    file: Path | None = Path(source.location) / MASK_FILE
    if not source.is_local:
        file = hub.find_file(source.location, MASK_FILE, revision)
    if file is None or not file.exists():
        return None
    mask = WeMask.load(file.parent)
    if merged and mask.made_for is not None:
        # It was made for the base, whose weights were held to the adapter's record before they were merged.
        mask = replace(mask, made_for=replace(mask.made_for, fingerprint=fingerprint(model)))
    mask.attach(model)
    warnings.warn(
        f"The mask saved with {source.name} is applied ({mask.selector} {mask.rate:g}, strength {mask.strength:g}). "
        "load(..., mask=False), or --no-mask, leaves it out.",
        MelayerWarning,
        stacklevel=3,
    )
    return mask
