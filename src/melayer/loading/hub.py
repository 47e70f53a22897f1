"""A checkpoint's files from the hub, asked for their size before they are fetched."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from melayer.errors import ModelError, first_line
from melayer.loading.shards import INDEX, SINGLE, names_by_shard

_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
"""Config, index, tokenizer and modelling code; small, and needed."""


def fetch(name: str, revision: str | None = None) -> Path:
    """The directory with the checkpoint `name`, from the hub's cache or fetched into it now.

    Args:
        name: A hub id.
        revision: Branch, tag or commit.

    Raises:
        ModelError: It cannot be had, has no safetensors weights, or does not fit on the disk.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except _unreachable() as error:
        return _cached(name, revision, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if SINGLE not in sizes and INDEX not in sizes:
        raise ModelError(
            f"{name} has no safetensors weights on the hub (neither {SINGLE} nor {INDEX}), and no others can be read "
            "block by block. Leave --frugal out, or give a safetensors checkpoint."
        )
    # Other copies of the weights (fp16, consolidated) may stand beside those that are meant.
    weights = [SINGLE]
    if SINGLE not in sizes:
        try:
            weights = list(names_by_shard(Path(hf_hub_download(name, INDEX, revision=info.sha))))
        except _unreachable() as error:
            raise _not_to_be_had(name, error) from error
    beside = [file for file in sizes if "/" not in file and any(fnmatch(file, pattern) for pattern in _BESIDE)]
    absent = sorted(set(weights) - set(sizes))
    if absent:
        raise ModelError(
            f"The index of {name} on the hub names {absent[0]}, which is not there. Ask its author for it."
        )
    wanted = [*beside, *weights]
    needed = sum(
        sizes[file] for file in wanted if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)
    )
    place = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(parent for parent in (place, *place.parents) if parent.exists())).free
    if needed > free:
        raise ModelError(
            f"{name} does not fit on the disk: {_gigabytes(needed)} are still to be fetched, and {place} has "
            f"{_gigabytes(free)} left. Make room, or set HF_HUB_CACHE to a directory on a larger disk."
        )
    try:
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    except _unreachable() as error:
        raise _not_to_be_had(name, error) from error


def find_file(name: str, file: str, revision: str | None = None, *, here_only: bool = False) -> Path | None:
    """One small file of a repository, from the hub's cache or fetched into it; None where it is not to be had.

    Args:
        name: A hub id.
        file: Its name.
        revision: Branch, tag or commit.
        here_only: Only from the cache.
    """
    from transformers.utils.hub import cached_file

    # That it is not there is the common case, and no error; nor is it that the hub does not answer.
    path = cached_file(
        name,
        file,
        revision=revision,
        local_files_only=here_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def _cached(name: str, revision: str | None, reason: Exception) -> Path:
    """The checkpoint as an earlier fetch left it, where the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        raise _not_to_be_had(name, reason) from reason
    return Path(config).parent


def _not_to_be_had(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name!r} is not a file or directory here, and it cannot be had from the hub: {first_line(error)} "
        "Check the spelling and the network, or give a local directory."
    )


def _unreachable() -> tuple[type[Exception], ...]:
    """What the client raises where the hub, or the repository or file on it, cannot be reached."""
    from huggingface_hub import errors

    # Its HTTP library's own errors come through; the module of errors imports their base, under whatever name.
    return errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError  # type: ignore[attr-defined]


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
