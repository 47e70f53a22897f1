"""What a model is read from: plain files of its own directory, and which of them hold the weights.

A checkpoint can come from anybody, and what it says of itself proves nothing. A file is taken as its own where it is a
plain file that lies in the directory once links are followed, or, in the hub's cache, among the blobs that snapshots
link to. Nothing else is opened, so that what is hashed is what was loaded.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from melayer.errors import MelayerWarning, ModelError, border
from melayer.runs import cache, records

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TEMPLATES = "additional_chat_templates"
"""The one directory beside the files that a tokenizer reads from."""

_READ = (".json", ".safetensors", *PICKLES, ".model", ".txt", ".jinja", ".py", ".tiktoken", ".spm", ".bpe", ".vocab")
"""What ends the names of the files that transformers, tokenizers and peft open."""
_COPY_AGAIN = "Download or copy the checkpoint again."


class TensorInfo(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, I8."""


def require_own(directory: Path) -> None:
    """Refuses a directory in which a file that may be read is none, or is a link that leads out of it.

    Raises:
        ModelError: As it says, with the file's name.
    """
    with border(f"The directory {directory} cannot be read", "Give one that you may read.", error=ModelError):
        places = [directory, *([directory / TEMPLATES] if (directory / TEMPLATES).exists() else [])]
        for place in places:
            require_within(place, directory)
            for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
                if entry.name.lower().endswith(_READ) and not entry.is_dir():
                    require_plain(Path(entry.path), directory)


def require_plain(file: Path, directory: Path) -> None:
    """Raises ModelError unless this is a plain file of the directory."""
    require_within(file, directory)
    if not file.is_file():
        what = "leads nowhere" if file.is_symlink() and not file.exists() else "is no plain file"
        raise ModelError(f"{file} {what}, so it cannot be read. {_COPY_AGAIN}")


def require_within(file: Path, directory: Path) -> None:
    """Raises ModelError where links lead out of the directory."""
    root = directory.resolve()
    homes = [root]
    # The hub's client keeps snapshots/REVISION/FILE as a link to blobs/HASH, both in the repository's own directory.
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and not blobs.is_symlink():
        homes.append(blobs)
    try:
        real = file.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, until Python 3.13
        raise ModelError(f"{file} leads nowhere, so it cannot be read. {_COPY_AGAIN}") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise ModelError(
            f"{file} leads out of the model's directory, to {real}. What belongs to a model has to lie in its "
            "directory: copy the file there, or give the directory that holds it."
        )


def weight_files(
    directory: Path, *, allow_pickle: bool = False, named: str | None = None
) -> dict[Path, tuple[str, ...]]:
    """The files that transformers reads a model's weights from, each with the tensors that an index promises in it.

    Args:
        directory: Where they are.
        allow_pickle: Whether weights may be pickles, where there are no others.
        named: The file that config.json names in place of the usual ones.

    Raises:
        ModelError: There are none, the index is none, names what is not there, or leads out of the directory.
    """
    usual = (SINGLE, INDEX, *((PICKLE, PICKLE_INDEX) if allow_pickle else ()))
    for name in (named,) if named is not None else usual:
        path = directory / _relative(name, directory / CONFIG)
        if path.is_file():
            require_plain(path, directory)
            return _indexed(path, directory) if name.endswith(".index.json") else {path: ()}
    if named is not None:
        raise ModelError(f"{directory / CONFIG} names {named} as the file of weights, and it is not there.")
    raise ModelError(f"The directory {directory} holds no weights: expected {SINGLE}, or {INDEX} and its shards.")


def names_by_shard(index: Path) -> dict[str, tuple[str, ...]]:
    """The shards that an index names, by their path below it, each with the tensors that it promises in it.

    Raises:
        ModelError: It is not an index, or a name leads elsewhere.
    """
    try:
        found = records.read(index, _Index, f"{index} is not an index of shards", _COPY_AGAIN, ModelError)
    except FileNotFoundError as error:
        raise ModelError(f"There is no index {index}. {_COPY_AGAIN}") from error
    held: dict[str, list[str]] = {}
    for name, file in found.weight_map.items():
        held.setdefault(_relative(file, index), []).append(name)
    if not held:
        raise ModelError(f"{index} names no weights. {_COPY_AGAIN}")
    ending = PICKLES if index.name == PICKLE_INDEX else (".safetensors",)
    other = next((file for file in held if not file.endswith(ending)), None)
    if other is not None:
        raise ModelError(f"{index} names {other!r}, which is no file of weights. {_COPY_AGAIN}")
    return {file: tuple(names) for file, names in sorted(held.items())}


@dataclass(frozen=True)
class _Index:
    """What of an index is read; the rest of it is nobody's concern."""

    weight_map: dict[str, str]


def _indexed(index: Path, directory: Path) -> dict[Path, tuple[str, ...]]:
    files = {directory / file: names for file, names in names_by_shard(index).items()}
    with border(f"The shards that {index} names cannot be looked at", _COPY_AGAIN, error=ModelError):
        for file in files:
            require_within(file, directory)
        missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise ModelError(
            f"{index} names {len(files)} shards, and {len(missing)} of them are not there (the first is {missing[0]}). "
            + _COPY_AGAIN
        )
    return files


def _relative(name: str, told_by: Path) -> str:
    """The name of a file in a directory or below it, as it was given.

    Raises:
        ModelError: It is no such name.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise ModelError(
            f"{told_by} names {name[:200]!r} as a file of weights, which is no file below its directory. {_COPY_AGAIN}"
        )
    return name


def headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """What safetensors files hold, by the tensors' names, from their headers alone; pickles hold nothing for this.

    Raises:
        ModelError: One is damaged.
    """
    from safetensors import safe_open

    held: dict[str, TensorInfo] = {}
    for file in files:
        if file.suffix != ".safetensors":
            continue
        with (
            border(
                f"{file} is damaged and cannot be read as safetensors", "Download or copy it again.", error=ModelError
            ),
            safe_open(file, framework="pt") as handle,
        ):
            for name in handle.keys():  # noqa: SIM118 - no mapping
                if name in held:
                    # Which of the two is loaded is a matter of chance.
                    raise ModelError(f"{file} holds {name}, which another of its files holds too. {_COPY_AGAIN}")
                part = handle.get_slice(name)
                held[name] = TensorInfo(tuple(part.get_shape()), str(part.get_dtype()))
    return held


def count_tensors(files: Sequence[Path], held: Mapping[str, TensorInfo]) -> int | None:
    """How many tensors there are in all; None where a pickle of an old kind does not say without being read."""
    n_pickled = 0
    for file in files:
        if file.suffix != ".safetensors":
            if not zipfile.is_zipfile(file):
                return None
            with zipfile.ZipFile(file) as archive:
                n_pickled += sum("/data/" in name for name in archive.namelist())
    return len(held) + n_pickled


# --- what was loaded --------------------------------------------------------------------------------------------------


class Hashed(NamedTuple):
    """A file that was hashed when it was read."""

    name: str
    sha256: str


class _Seen(NamedTuple):
    """A file as it was when it was read."""

    path: Path
    state: tuple[int, int, int]


_loaded: WeakKeyDictionary[nn.Module, dict[str, Hashed | _Seen]] = WeakKeyDictionary()


def remember(
    model: nn.Module, directory: Path, files: Iterable[Path | Hashed], *, base: nn.Module | None = None
) -> None:
    """Notes which files a model was loaded from.

    Args:
        model: The model.
        directory: Where they are.
        files: The files.
        base: A model that it was made of, whose files come with it.
    """
    known: dict[str, Hashed | _Seen] = dict(_loaded.get(base, {})) if base is not None else {}
    own: dict[str, Hashed | _Seen] = {}
    for file in files:
        if isinstance(file, Hashed):
            own[file.name] = file
        else:
            own[file.relative_to(directory).as_posix()] = _Seen(file, _state(file))
    # An adapter's base may be another adapter, with files of the same names.
    _loaded[model] = {**own, **{f"base/{name}" if name in own else name: file for name, file in known.items()}}


def hashes(model: nn.Module) -> dict[str, str]:
    """The sha256 of each file that a model was loaded from, by its name; empty for a model that `load` did not load.

    Warns:
        MelayerWarning: A file is no longer what was loaded; it is left out.
    """
    found = {}
    for name, file in _loaded.get(model, {}).items():
        if isinstance(file, Hashed):
            found[name] = file.sha256
            continue
        try:
            digest = cache.sha256_of(file.path) if _state(file.path) == file.state else None
            same = digest is not None and _state(file.path) == file.state
        except OSError:
            same = False
        if digest is not None and same:
            found[name] = digest
        else:
            warnings.warn(
                f"{file.path} has changed since the model was loaded from it, so its hash is left out.",
                MelayerWarning,
                stacklevel=2,
            )
    return found


def _state(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
