"""A checkpoint read into memory: its config, its model with or without weights, its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from melayer.errors import ModelError, first_line, require_known
from melayer.loading import adapters, hub
from melayer.loading.demo import demo_file
from melayer.loading.shards import Shards, open_shards
from melayer.loading.source import MASK_FILE, Source, find
from melayer.runs import cache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What transformers and safetensors raise on a checkpoint that they cannot read; SafetensorError joins at run time.
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)


class Skeleton(NamedTuple):
    """What `skeleton` returns."""

    model: PreTrainedModel
    """Every parameter and buffer on the meta device, with the shape and the dtype that `load` would give it."""
    tokenizer: PreTrainedTokenizerBase
    shards: Shards


def skeleton(
    name: str,
    *,
    dtype: DTypeName = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    mask: bool = True,
) -> Skeleton:
    """The model that `name` stands for without its weights, its tokenizer, and the files that hold the weights.

    Args:
        name: `demo`, a local directory, a `.gguf` file, or a hub id; of a hub id every file is fetched.
        dtype: As in `load`.
        trust_remote_code: As in `load`.
        revision: As in `load`.
        mask: False says that a mask saved with the model may be left out.

    Raises:
        ModelError: The model cannot be found, read or trusted; a shard is missing or damaged; or it is of a kind
            that needs all its weights at once.
    """
    if adapters.find(name) is not None:
        raise ModelError(
            f"{name} holds an adapter, which is merged into the weights of the whole model. Leave --frugal out."
        )
    source = find(name)
    directory = Path(source.location) if source.is_local else hub.fetch(source.location, revision)
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles and not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"The weights in {directory} are pickles ({pickles[0]}), which cannot be read block by block. "
            "Leave --frugal out and pass --allow-pickle, or convert them to safetensors."
        )
    check_directory(directory, False)
    _refuse_mask(name, directory, mask)
    shards = open_shards(directory)
    source = replace(source, location=str(directory))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = read_config(source, options)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown method")
        raise ModelError(
            f"{name} is quantised ({method}), and such weights cannot be read block by block. "
            "Leave --frugal out, or give the checkpoint that it was made from."
        )
    model = read_model(source, config, dtype_of(dtype), {"device_map": {"": "meta"}}, False, options)
    return Skeleton(model, read_tokenizer(source, options), shards)


def _refuse_mask(name: str, directory: Path, mask: bool) -> None:
    if mask and (directory / MASK_FILE).exists():
        raise ModelError(
            f"A mask was saved with {name}, and it needs the whole model. Pass --no-mask (mask=False) to measure the "
            "model without it, or leave --frugal out."
        )


def check_directory(directory: Path, allow_pickle: bool) -> None:
    """Refuses what can be refused about a directory before its weights are read.

    Raises:
        ModelError: It holds no model, a damaged file of weights, or pickles that may not be read.
    """
    if not (directory / "config.json").is_file():
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f"It holds {ggufs[0]}: name that file." if ggufs else "Name the directory that from_pretrained takes."
        raise ModelError(f"The directory {directory} holds no config.json, so it is not a model. {hint}")
    shards = sorted(directory.glob("*.safetensors"))
    for shard in shards:
        _check_safetensors(shard)
    if shards or allow_pickle:
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"The weights in {directory} are pickles ({pickles[0]}), and reading a pickle can run any code that is "
            "in it. If you trust its author, pass --allow-pickle (allow_pickle=True); safer: a safetensors checkpoint."
        )
    raise ModelError(f"The directory {directory} holds no weights: expected model.safetensors or its shards.")


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is damaged and cannot be read as safetensors ({error}). Download or copy it again."
        ) from error


def read_config(source: Source, options: dict[str, Any]) -> PreTrainedConfig:
    """The config of a causal decoder.

    Args:
        source: Where it is.
        options: What `from_pretrained` takes beside: trust_remote_code, revision.

    Raises:
        ModelError: It cannot be read, or is of an encoder-decoder model.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.location, **options)
    except _UNREADABLE as error:
        raise _unreadable(source, "config", error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name} is an encoder-decoder model ({config.model_type}). melayer measures causal decoders; "
            "give one of those."
        )
    return config


def read_model(
    source: Source,
    config: PreTrainedConfig,
    dtype: Any,
    spread: dict[str, Any],
    allow_pickle: bool,
    options: dict[str, Any],
) -> PreTrainedModel:
    """The model with all its weights.

    Args:
        source: Where it is.
        config: As `read_config` returned it.
        dtype: As `dtype_of` returned it.
        spread: Over which devices, as `placement` returned it.
        allow_pickle: Whether weights may be pickles.
        options: As in `read_config`.

    Raises:
        ModelError: It is not a causal language model, cannot be read, or lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise ModelError(
            f"{source.name} ({config.model_type}) is not a causal language model: transformers has no "
            "AutoModelForCausalLM for it. melayer measures causal decoders; give one of those."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **spread,
            **options,
        )
    except (*_UNREADABLE, SafetensorError) as error:
        raise _unreadable(source, "weights", error) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        # transformers fills these with random numbers and goes on; a measurement must not.
        raise ModelError(
            f"The checkpoint {source.name} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"(the first is {missing[0]}), and they would be random. Give a complete causal language model."
        )
    return model


def read_tokenizer(source: Source, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Args:
        source: Where it is.
        options: As in `read_config`.

    Raises:
        ModelError: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.location, **options)
    except _UNREADABLE as error:
        raise _unreadable(source, "tokenizer", error) from error
    return tokenizer


def _unreadable(source: Source, part: str, error: BaseException) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{source.name} brings its own modelling code, which would run on this machine. If you trust its author, "
            "pass --trust-remote-code (trust_remote_code=True)."
        )
    if source.is_local:
        return ModelError(f"The {part} of {source.name} cannot be read: {first_line(error)}")
    return ModelError(
        f"{source.name!r} is not a file or directory here, and its {part} cannot be had from the hub: "
        f"{first_line(error)} "
        "Check the spelling and the network, or give a local directory."
    )


def dtype_of(name: str) -> str | torch.dtype:
    """The dtype that a name stands for, as `from_pretrained` takes it.

    Raises:
        ModelError: There is no such name.
    """
    import torch

    require_known(name, get_args(DTypeName), f"The dtype {name!r} is not known", error=ModelError)
    return name if name == "auto" else getattr(torch, name)


def placement(device_map: Any, max_memory: dict[int | str, str] | None, offload_folder: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes for a model that is not on one device; empty for one that is.

    Raises:
        ModelError: Something is given that a device map is needed for.
    """
    if device_map is None:
        if max_memory is not None or offload_folder is not None:
            raise ModelError("max_memory and offload_folder go with a device map. Add --device-map auto.")
        return {}
    options = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    return {key: value for key, value in options.items() if value is not None}


def device_of(name: str) -> torch.device:
    """The device that a name stands for; `auto` takes CUDA, else MPS, else the CPU.

    Raises:
        ModelError: It cannot be used here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        # Allocating is the only test that holds for every kind of device and every index.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"The device {name!r} cannot be used here ({first_line(error)}). Use --device auto, or cpu."
        ) from error
    if device.type == "meta":
        raise ModelError("The device 'meta' holds no numbers to measure. Use --device auto, or cpu.")
    return device


def weight_hashes(model: PreTrainedModel, name: str) -> dict[str, str]:
    """The sha256 of each file of weights that a model was loaded from; empty where they are not on this disk.

    Args:
        model: As `load` returned it.
        name: As it was given to `load`; a GGUF file is hashed as it came, not as it was converted.
    """
    adapter = adapters.find(name)
    if adapter is not None:
        own = {file.name: cache.sha256_of(file) for file in sorted(adapter.directory.glob("*.safetensors"))}
        return own if adapter.base is None else {**own, **weight_hashes(model, adapter.base)}
    source = find(name)
    if source.gguf_sha256 is not None:
        file = demo_file() if name == "demo" else Path(name)
        return {file.name: source.gguf_sha256}
    directory = Path(source.location)
    if not source.is_local:
        config = hub.find_file(name, "config.json", here_only=True)
        if config is None:
            return {}
        directory = config.parent
    return {file.name: cache.sha256_of(file) for file in sorted(directory.glob("*.safetensors"))}
