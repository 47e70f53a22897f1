"""A checkpoint read into memory: its model with or without weights, its tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from melayer.errors import MelayerWarning, ModelError, border
from melayer.loading import adapters, files
from melayer.loading.config import named_weights, read_config
from melayer.loading.devices import DTypeName, dtype_of
from melayer.loading.files import CONFIG, PICKLES, TensorInfo
from melayer.loading.reading import named, reading, require_said
from melayer.loading.shards import Shards, open_shards
from melayer.loading.source import MASK_FILE, Source, find, require_revision_used
from melayer.loading.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_AGAIN = "Download or copy the checkpoint again."
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INTEGERS = ("I", "U", "BOOL")
"""How safetensors' names of dtypes begin that are no floating point."""


class Skeleton(NamedTuple):
    """What `skeleton` returns."""

    model: PreTrainedModel
    """Every parameter and buffer on the meta device, with the shape and the dtype that `load` would give it."""
    tokenizer: PreTrainedTokenizerBase
    shards: Shards


class WeightFiles(NamedTuple):
    """What there is to know of a model's weights before they are read."""

    files: tuple[Path, ...]
    held: dict[str, TensorInfo]
    """The tensors in those that are safetensors files."""

    @property
    def n_tensors(self) -> int | None:
        """How many tensors there are; None where that is not known."""
        return files.count_tensors(self.files, self.held)


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
    require_said(trust_remote_code)
    name = named(name)
    source = find(name, revision=revision)
    require_revision_used(revision, [source])
    directory = source.directory
    with border(f"{name} cannot be loaded", _AGAIN, error=ModelError):
        if adapters.find(directory) is not None:
            raise ModelError(
                f"{name} holds an adapter, which is merged into the weights of the whole model. Leave --frugal out."
            )
        pickles = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
        if pickles and not any(directory.glob("*.safetensors*")):
            raise ModelError(
                f"The weights in {directory} are pickles ({pickles[0]}), which cannot be read block by block. "
                "Leave --frugal out and pass --allow-pickle, or convert them to safetensors."
            )
        weights = check_directory(directory, False)
        _refuse_mask(name, directory, mask)
        shards = open_shards(directory, named_weights(name, directory))
        config = read_config(name, directory, trust_remote_code=trust_remote_code, n_tensors=weights.n_tensors)
        quantised = getattr(config, "quantization_config", None)
        if quantised is not None:
            method = dict(quantised).get("quant_method", "unknown method")
            raise ModelError(
                f"{name} is quantised ({method}), and such weights cannot be read block by block. "
                "Leave --frugal out, or give the checkpoint that it was made from."
            )
        model = read_model(
            source, config, weights, dtype_of(dtype), {"device_map": {"": "meta"}}, trust_remote_code=trust_remote_code
        )
        return Skeleton(model, read_tokenizer(name, directory, trust_remote_code=trust_remote_code), shards)


def _refuse_mask(name: str, directory: Path, mask: bool) -> None:
    if mask and (directory / MASK_FILE).exists():
        raise ModelError(
            f"A mask was saved with {name}, and it needs the whole model. Pass --no-mask (mask=False) to measure the "
            "model without it, or leave --frugal out."
        )


def check_directory(directory: Path, allow_pickle: bool) -> WeightFiles:
    """What is known of the weights in a directory, whose files are its own, and none of them damaged.

    Raises:
        ModelError: It holds no model, files that are not its own, damaged weights, or pickles that may not be read.
    """
    if not (directory / CONFIG).is_file():
        ggufs = sorted(file.name for file in directory.glob("*.gguf"))
        hint = f"It holds {ggufs[0]}: name that file." if ggufs else "Name the directory that from_pretrained takes."
        raise ModelError(f"The directory {directory} holds no config.json, so it is not a model. {hint}")
    files.require_own(directory)
    pickles = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickles and not allow_pickle and not any(directory.glob("*.safetensors*")):
        raise ModelError(
            f"The weights in {directory} are pickles ({pickles[0]}), and reading a pickle can run any code that is "
            "in it. If you trust its author, pass --allow-pickle (allow_pickle=True); safer: a safetensors checkpoint."
        )
    named = named_weights(str(directory), directory)
    promised = files.weight_files(directory, allow_pickle=allow_pickle, named=named)
    held = files.headers(promised)
    absent = [(name, file) for file, names in promised.items() if file.suffix not in PICKLES for name in names]
    lost = next(((name, file) for name, file in absent if name not in held), None)
    if lost is not None:
        raise ModelError(
            f"The index of {directory} places {lost[0]} in {lost[1].name}, which does not hold it. {_AGAIN}"
        )
    return WeightFiles(tuple(promised), held)


def read_model(
    source: Source,
    config: PreTrainedConfig,
    weights: WeightFiles,
    dtype: Any,
    spread: dict[str, Any],
    *,
    trust_remote_code: bool,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """The model with all its weights.

    Args:
        source: Where it is.
        config: As `read_config` returned it.
        weights: As `check_directory` returned them.
        dtype: As `dtype_of` returned it.
        spread: Over which devices, as `placement` returned it.
        trust_remote_code: Whether its own code may run.
        allow_pickle: Whether weights may be pickles.

    Raises:
        ModelError: It cannot be read, or lacks weights.

    Warns:
        MelayerWarning: There are weights that it has no place for.
    """
    from transformers import AutoModelForCausalLM

    name = source.name
    with reading(name, "weights", "Check config.json and generation_config.json, or download the model again."):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(source.directory),
                config=config,
                dtype=dtype,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **spread,
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error):
                raise _mismatched(name, config, weights, trust_remote_code) from error
            raise
    model: PreTrainedModel = loaded[0]
    require_complete(name, model, loaded[1], weights)
    files.remember(model, source.directory, weights.files if source.gguf is None else [source.gguf])
    return model


def require_complete(name: str, model: PreTrainedModel, info: dict[str, Any], weights: WeightFiles) -> None:
    """Raises ModelError where a model lacks weights, and says which are too many.

    Args:
        name: What the model is called in messages.
        model: As it was loaded.
        info: What transformers says of it: tied weights are not missing.
        weights: What it was loaded from.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills these with random numbers and goes on; a measurement must not.
        raise ModelError(
            f"The checkpoint {name} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"(the first is {missing[0]}), and they would be random. Give a complete causal language model."
        )
    parameters = {key: p for key, p in model.named_parameters() if p.is_floating_point()}
    whole = sorted(key for key, of in weights.held.items() if of.dtype.startswith(_INTEGERS) and key in parameters)
    if whole and getattr(model.config, "quantization_config", None) is None:
        raise ModelError(
            f"The checkpoint {name} holds {len(whole)} weights as whole numbers (the first is {whole[0]}), and its "
            "config does not say how to make weights of them. Give the checkpoint that it was made from."
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        warnings.warn(
            f"The checkpoint {name} holds {len(unused)} weights that {type(model).__name__} has no place for (the "
            f"first is {unused[0]}); they are left out.",
            MelayerWarning,
            stacklevel=4,
        )


def _mismatched(name: str, config: PreTrainedConfig, weights: WeightFiles, trust_remote_code: bool) -> ModelError:
    """Which weights have another shape than the config asks for, where their names tell."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    asked = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    other = [key for key, of in sorted(weights.held.items()) if key in asked and asked[key] != of.shape]
    first = f" (the first is {other[0]}: {weights.held[other[0]].shape}, not {asked[other[0]]})" if other else ""
    return ModelError(
        f"The weights of {name} have other shapes than its config asks for{first}. Check config.json against the "
        "weights, or download the model again."
    )


def weight_hashes(model: PreTrainedModel) -> dict[str, str]:
    """The sha256 of each file that a model's weights were read from, by name; empty where `load` did not load it.

    A GGUF file is hashed as it came, not as it was converted.

    Warns:
        MelayerWarning: A file is no longer what was loaded; it is left out.
    """
    return files.hashes(model)
