"""A safetensors checkpoint on disk: what is in which file, and a few tensors of it at a time in memory."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open

from melayer.errors import ModelError, border
from melayer.loading.files import weight_files

_COPY_AGAIN = "Download or copy it again."
_ALIGNED = 64
"""Matrix kernels are slow on weights that begin anywhere; in a file they begin at multiples of 8 bytes at best."""


@dataclass(frozen=True, order=True)
class Place:
    """Where the bytes of a tensor are."""

    file: Path
    start: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class Shards:
    """The tensors of a checkpoint, by name."""

    directory: Path
    views: Mapping[str, torch.Tensor]
    """Each tensor as a view of its mapped file: only what is looked at comes into memory, and stays there."""
    places: Mapping[str, Place]

    @property
    def n_bytes(self) -> int:
        """What all of them take."""
        return sum(place.n_bytes for place in self.places.values())


def open_shards(directory: Path, named: str | None = None) -> Shards:
    """The tensors of the checkpoint in `directory`; none is read yet.

    Args:
        directory: Where it is.
        named: The file that its config names in place of the usual ones.

    Raises:
        ModelError: There is no safetensors checkpoint, or a shard or one of its tensors is missing or damaged.
    """
    views: dict[str, torch.Tensor] = {}
    places: dict[str, Place] = {}
    for file, names in weight_files(directory, named=named).items():
        with border(f"{file} is damaged and cannot be read as safetensors", _COPY_AGAIN, error=ModelError):
            with safe_open(file, framework="pt") as handle:
                tensors = {name: handle.get_slice(name)[...] for name in handle.keys()}  # noqa: SIM118 - no mapping
            located = _places(file)
        absent = sorted(set(names) - set(tensors))
        if absent:
            raise ModelError(
                f"The index of {directory} places {absent[0]} in {file.name}, which does not hold it "
                f"({len(absent)} of its tensors are missing). Download or copy the checkpoint again."
            )
        views |= tensors
        places |= located
    return Shards(directory, views, places)


def _places(file: Path) -> dict[str, Place]:
    """Where each tensor lies: eight bytes give the header's length, the header is JSON, the tensors follow.

    The file was opened by safetensors before, which checks all that, and does not say where the tensors lie.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: Place(file, 8 + length + begin, end - begin) for name, (begin, end) in spans.items()}


def _damaged(file: Path, reason: str) -> ModelError:
    return ModelError(f"{file} is damaged and cannot be read as safetensors: {reason}. {_COPY_AGAIN}")


class Reader:
    """Groups of tensors in memory, two at a time: while one is at work, the next is being read.

    The memory of a group is used again for the group after the next, so that it is not asked for, and cleared, again
    and again; a tensor holds good until then.
    """

    def __init__(self, shards: Shards, groups: Sequence[Sequence[str]]) -> None:
        """Nothing is read yet.

        Args:
            shards: The checkpoint.
            groups: The names in each group, in the order in which the groups are wanted.
        """
        self._shards, self._groups = shards, groups
        self._slots: list[tuple[int, Future[dict[str, torch.Tensor]]] | None] = [None, None]
        sizes = [sum(_room(shards.places[name].n_bytes) for name in names) for names in groups]
        self._buffers = [torch.empty(max(sizes[slot::2], default=0), dtype=torch.uint8) for slot in (0, 1)]
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Reader:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being read."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def get(self, group: int) -> dict[str, torch.Tensor]:
        """The tensors of a group, by name; those of the group before may be overwritten from here on.

        Raises:
            ModelError: A file is shorter than it was, or cannot be read.
        """
        tensors = self._begin(group).result()
        if group + 1 < len(self._groups):
            self._begin(group + 1)
        return tensors

    def _begin(self, group: int) -> Future[dict[str, torch.Tensor]]:
        held = self._slots[group % 2]
        if held is not None and held[0] == group:
            return held[1]
        future = self._thread.submit(self._read, group)
        self._slots[group % 2] = (group, future)
        return future

    def _read(self, group: int) -> dict[str, torch.Tensor]:
        buffer, at, tensors = self._buffers[group % 2], 0, {}
        # In the order of the files and through one handle for each, so that the system reads ahead.
        ordered = sorted((self._shards.places[name], name) for name in self._groups[group])
        for file, held in itertools.groupby(ordered, key=lambda item: item[0].file):
            try:
                with file.open("rb", buffering=0) as stream:
                    for place, name in held:
                        part = buffer[at : at + place.n_bytes]
                        at += _room(place.n_bytes)
                        _fill(part, stream, place)
                        like = self._shards.views[name]
                        tensors[name] = part.view(like.dtype).view(like.shape)
            except OSError as error:
                raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
        return tensors


def _room(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNED) * _ALIGNED


def _fill(part: torch.Tensor, stream: io.FileIO, place: Place) -> None:
    """Reads the bytes at `place` into `part` [n_bytes]."""
    target, done = part.numpy().data, 0
    stream.seek(place.start)
    while done < place.n_bytes:
        count = stream.readinto(target[done:])
        if not count:
            raise _damaged(place.file, f"it ends at byte {place.start + done}")
        done += count
