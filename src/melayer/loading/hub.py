"""A checkpoint's files from the hub, asked for their size before they are fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from melayer.errors import ModelError, border, first_line
from melayer.loading.files import (
    CONFIG,
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SINGLE,
    TEMPLATES,
    names_by_shard,
)

ADAPTER, ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "*.bpe", "*.vocab")
"""Config, index, tokenizer and modelling code; small, and needed."""


def fetch(name: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """The directory with the checkpoint or the adapter `name`, from the hub's cache or fetched into it now.

    Args:
        name: A hub id.
        revision: Branch, tag or commit.
        allow_pickle: Whether weights may be pickles.

    Raises:
        ModelError: It cannot be had, has no weights that may be read, or does not fit on the disk.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except _unreachable() as error:
        return _cached(name, revision, error)
    todo = "Check the spelling and the network, or give a local directory."
    with border(f"{name!r} cannot be had from the hub", todo, error=ModelError):
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        weights = _weights(name, str(info.sha), sizes, allow_pickle)
        absent = sorted(set(weights) - set(sizes))
        if absent:
            raise ModelError(
                f"The index of {name} on the hub names {absent[0]}, which is not there. Ask its author for it."
            )
        beside = [file for file in sizes if "/" not in file and any(fnmatch(file, pattern) for pattern in _BESIDE)]
        beside += [file for file in sizes if fnmatch(file, f"{TEMPLATES}/*.jinja")]
        wanted = [*beside, *weights]
        _require_room(name, str(info.sha), {file: sizes[file] for file in wanted})
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))


def _weights(name: str, sha: str, sizes: Mapping[str, int], allow_pickle: bool) -> list[str]:
    """The files of weights that are needed: other copies of them (fp16, consolidated) may stand beside."""
    from huggingface_hub import hf_hub_download

    whole = {SINGLE: INDEX, **({PICKLE: PICKLE_INDEX} if allow_pickle else {})}
    for single, index in whole.items():
        if single in sizes:
            return [single]
        if index in sizes:
            return list(names_by_shard(Path(hf_hub_download(name, index, revision=sha))))
    if ADAPTER in sizes:
        for file in (ADAPTER_WEIGHTS, *((ADAPTER_PICKLE,) if allow_pickle else ())):
            if file in sizes:
                return [file]
    elif CONFIG in sizes and any(file.endswith(".safetensors") for file in sizes):
        # A few name their weights otherwise.
        values = json.loads(Path(hf_hub_download(name, CONFIG, revision=sha)).read_bytes())
        named = values.get("transformers_weights") if isinstance(values, dict) else None
        if isinstance(named, str) and named in sizes:
            return [named] if named.endswith(".safetensors") else _named(name, named, sha)
    expected = ADAPTER_WEIGHTS if ADAPTER in sizes else f"neither {SINGLE} nor {INDEX}"
    pickled = sorted({PICKLE, PICKLE_INDEX, ADAPTER_PICKLE} & set(sizes))
    todo = (
        f"It has pickles ({pickled[0]}), and reading one can run any code that is in it: if you trust its author, "
        "pass --allow-pickle (allow_pickle=True), without --frugal."
        if pickled
        else "Give a safetensors checkpoint."
    )
    raise ModelError(f"{name} has no safetensors weights on the hub ({expected}). {todo}")


def _named(name: str, index: str, sha: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    return [index, *names_by_shard(Path(hf_hub_download(name, index, revision=sha)))]


def _require_room(name: str, sha: str, sizes: Mapping[str, int]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    needed = sum(
        size for file, size in sizes.items() if not isinstance(try_to_load_from_cache(name, file, revision=sha), str)
    )
    place = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free
    if needed > free:
        raise ModelError(
            f"{name} does not fit on the disk: {_gigabytes(needed)} are still to be fetched, and {place} has "
            f"{_gigabytes(free)} left. Make room, or set HF_HUB_CACHE to a directory on a larger disk."
        )


def _cached(name: str, revision: str | None, reason: Exception) -> Path:
    """The checkpoint as an earlier fetch left it, where the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    for file in (CONFIG, ADAPTER):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    raise ModelError(
        f"{name!r} is not a file or directory here, and it cannot be had from the hub: {first_line(reason)} "
        "Check the spelling and the network, or give a local directory."
    ) from reason


def _unreachable() -> tuple[type[Exception], ...]:
    """What the client raises where the hub, or the repository or file on it, cannot be reached."""
    from huggingface_hub import errors

    # Its HTTP library's own errors come through; the module of errors imports their base, under whatever name.
    return errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError  # type: ignore[attr-defined]


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
