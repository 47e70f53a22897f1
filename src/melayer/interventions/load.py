"""A name becomes a model that runs as it was saved: with its adapter, and under its mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from melayer.errors import MelayerWarning, ModelError, border
from melayer.interventions.mask import WeMask
from melayer.loading import adapters, files
from melayer.loading.checkpoint import check_directory, read_model
from melayer.loading.config import read_config
from melayer.loading.devices import DTypeName, device_of, dtype_of, placement
from melayer.loading.reading import named, require_said, shown
from melayer.loading.source import MASK_FILE, Source, find, require_revision_used
from melayer.loading.tokenizer import read_tokenizer
from melayer.model.provenance import fingerprint

if TYPE_CHECKING:
    import torch
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
    require_said(trust_remote_code)
    name = named(name)
    spread = placement(device_map, max_memory, offload_folder)
    place = _Place(dtype_of(dtype), None if spread else device_of(device), spread)
    trust = _Trust(allow_pickle, trust_remote_code)
    said = f"{shown(name, quote=False)} cannot be loaded"
    with border(said, "Check that it is whole, and that there is memory for it.", error=ModelError):
        source, chain = _resolved(name, base, revision, trust)
        model, tokenizer = _read(source, place, trust)
        if chain:
            return _with_adapters(chain, source.name, model, tokenizer, trust, mask)
        return Loaded(model, tokenizer, _saved_mask(source, model) if mask else None)


class _Place(NamedTuple):
    """In which dtype and where a model is wanted."""

    dtype: str | torch.dtype
    device: torch.device | None
    """None where it is spread over several."""
    spread: dict[str, Any]


class _Trust(NamedTuple):
    """What a checkpoint may do."""

    allow_pickle: bool
    trust_remote_code: bool


class _Chained(NamedTuple):
    """An adapter on the way from a name to the model that it stands for."""

    source: Source
    adapter: adapters.Adapter


def _resolved(name: str, base: str | None, revision: str | None, trust: _Trust) -> tuple[Source, list[_Chained]]:
    """The whole model that a name leads to, and the adapters on the way, the outermost first."""
    chain: list[_Chained] = []
    asked = revision
    source = find(name, revision=revision, allow_pickle=trust.allow_pickle)
    while (adapter := adapters.find(source.directory)) is not None:
        here = [link.adapter.directory.resolve() for link in chain]
        if adapter.directory.resolve() in here:
            way = " -> ".join([*(link.source.name for link in chain), source.name])
            raise ModelError(
                f"The adapter in {source.name} is its own base ({way}). Name the model that it was trained on with "
                "base= (--base)."
            )
        adapters.weights(adapter, trust.allow_pickle)
        chain.append(_Chained(source, adapter))
        of = base if base is not None and len(chain) == 1 else adapter.base
        if of is None:
            raise ModelError(
                f"The adapter in {source.name} does not say what it was trained on. Name it with base= (--base)."
            )
        # A revision on the hub is one of what was named there; of an adapter in a directory here, its base's.
        revision = adapter.revision if source.from_hub else revision or adapter.revision
        with _base_of(source.name, of):
            source = find(of, revision=revision, allow_pickle=trust.allow_pickle)
    require_revision_used(asked, [source, *(link.source for link in chain)])
    if base is not None and not chain:
        raise ModelError(f"A base was given ({base}), but {name} is no directory with an adapter. Leave it out.")
    return source, chain


@contextmanager
def _base_of(name: str, base: str) -> Iterator[None]:
    """What is wrong with an adapter's base is said of both."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"{name} holds an adapter for {base}, which cannot be loaded: {error} Name its place with base= (--base)."
        ) from error


def _read(source: Source, place: _Place, trust: _Trust) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A whole model, on its device, and its tokenizer."""
    name, directory = source.name, source.directory
    weights = check_directory(directory, trust.allow_pickle)
    trusted = trust.trust_remote_code
    config = read_config(name, directory, trust_remote_code=trusted, n_tensors=weights.n_tensors)
    tokenizer = read_tokenizer(name, directory, trust_remote_code=trusted)
    model = read_model(
        source,
        config,
        weights,
        place.dtype,
        place.spread,
        trust_remote_code=trusted,
        allow_pickle=trust.allow_pickle,
    )
    module: nn.Module = model  # whose methods have types, which PreTrainedModel's have not
    if place.device is not None:
        module.to(place.device)
    module.eval()
    return model, tokenizer


def _with_adapters(
    chain: Sequence[_Chained],
    base: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trust: _Trust,
    mask: bool,
) -> Loaded:
    """The model with the adapters merged, the innermost first; the outermost's tokenizer and mask."""
    unmerged = ""
    for source, adapter in reversed(chain):
        unmerged = fingerprint(model)
        whole = adapters.merged(model, adapter, base)
        files.remember(whole, adapter.directory, [adapters.weights(adapter, trust.allow_pickle)], base=model)
        model, base = whole, source.name
        if (adapter.directory / "tokenizer_config.json").is_file():
            tokenizer = read_tokenizer(source.name, adapter.directory, trust_remote_code=trust.trust_remote_code)
    module: nn.Module = model
    module.eval()
    return Loaded(model, tokenizer, _saved_mask(chain[0].source, model, unmerged) if mask else None)


def _saved_mask(source: Source, model: PreTrainedModel, unmerged: str | None = None) -> WeMask | None:
    """The mask beside the weights, applied.

    Args:
        source: Where they are.
        model: What it is applied to.
        unmerged: The fingerprint of the model before the adapter beside the mask was merged, where there is one.
    """
    if not (source.directory / MASK_FILE).exists():
        return None
    mask = WeMask.load(source.directory)
    if mask.made_for is not None and mask.made_for.fingerprint == unmerged:
        # Made for the base, as training makes it: it goes with what the base has become.
        mask = replace(mask, made_for=replace(mask.made_for, fingerprint=fingerprint(model)))
    mask.attach(model)
    warnings.warn(
        f"The mask saved with {source.name} is applied ({mask.selector} {mask.rate:g}, strength {mask.strength:g}). "
        "load(..., mask=False), or --no-mask, leaves it out.",
        MelayerWarning,
        stacklevel=3,
    )
    return mask
