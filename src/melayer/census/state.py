"""How far a scan has come, and what it has found until then: kept on the disk, and merged across processes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # pydantic reads those of `typing` from Python 3.12 on

from melayer.census.counts import Census
from melayer.data.corpus import MAX_NAMED, LeftOut
from melayer.errors import InputError, OutputError, border, reason
from melayer.runs import atomic, ours, records
from melayer.runs.json_text import json_text

PATTERN = "scan.*.state"
"""The files of a scan's directory in which each process keeps what it has found: archives of arrays, each part of
which has its checksum in the archive."""
_TODO = "Give another place, or remove it."
READING = 2
"""The way in which documents become sequences. The first one put a begin-of-sequence token before texts that bring
theirs, and read JSON by the name of its file: its figures are not mixed with those of today."""


class ScanSettings(TypedDict):
    """What the figures of a scan depend on."""

    model: str
    """The fingerprint of the weights, and their dtype."""
    data: dict[str, Any]
    """The fields of the `Corpus`; of files also their `bytes`, and how many `files` there are."""
    sites: list[str]
    max_tokens: int
    truncate: bool
    bos: bool | None
    limit: int | None
    criterion: dict[str, Any]
    formats: list[str]
    mask: str | None
    reading: int
    """`READING`: how documents become sequences."""


@dataclass(frozen=True)
class Share:
    """The documents that one of several processes has dealt with: those before `until` whose turn was its."""

    rank: int
    size: int
    until: int

    def has(self, index: int) -> bool:
        """Whether this document is one of them."""
        return index < self.until and index % self.size == self.rank


class _About(TypedDict):
    """What a state says of its arrays."""

    settings: dict[str, Any]
    categories: list[str]
    shares: list[tuple[int, int, int]]
    left_out: list[tuple[int, str]]
    n_left_out: int
    seconds: float


@dataclass(eq=False)
class State:
    """What a process has found."""

    settings: ScanSettings
    censuses: dict[str, Census] = field(default_factory=dict)
    """By category; the documents of one without are under an empty name."""
    shares: dict[tuple[int, int], Share] = field(default_factory=dict)
    """By rank and size: the documents that these figures are of."""
    left_out: list[LeftOut] = field(default_factory=list)
    """The first of them."""
    n_left_out: int = 0
    seconds: float = 0.0
    """Time spent on it, in all processes together."""
    elsewhere: tuple[Share, ...] = ()
    """What is dealt with, and whose figures another process has."""

    def done(self, index: int) -> bool:
        """Whether a document is dealt with."""
        return any(share.has(index) for share in (*self.shares.values(), *self.elsewhere))

    def leave_out(self, document: LeftOut) -> None:
        """Counts what cannot be read, and names the first of it."""
        self.n_left_out += 1
        self.left_out = sorted([*self.left_out, document], key=lambda found: found.index)[:MAX_NAMED]

    def advance(self, rank: int, size: int, until: int) -> None:
        """All documents before `until` whose turn was this process' are dealt with."""
        self.shares[rank, size] = Share(rank, size, until)

    def includes(self, other: State) -> bool:
        """Whether nothing is in the other that is not in this one already."""
        return all(key in self.shares and share.until <= self.shares[key].until for key, share in other.shares.items())

    def absorb(self, other: State) -> None:
        """Adds what another process has found.

        Raises:
            InputError: It is of another run.
        """
        agree(self.settings, other.settings, "another process")
        for name, census in other.censuses.items():
            if name in self.censuses:
                self.censuses[name].absorb(census)
            else:
                self.censuses[name] = census
        for key, share in other.shares.items():
            if key not in self.shares or self.shares[key].until < share.until:
                self.shares[key] = share
        self.left_out = sorted([*self.left_out, *other.left_out], key=lambda found: found.index)[:MAX_NAMED]
        self.n_left_out += other.n_left_out
        self.seconds += other.seconds

    def to_bytes(self) -> bytes:
        """All of it."""
        about = {
            "settings": self.settings,
            "categories": list(self.censuses),
            "shares": [[share.rank, share.size, share.until] for share in self.shares.values()],
            "left_out": [[found.index, found.reason] for found in self.left_out],
            "n_left_out": self.n_left_out,
            "seconds": self.seconds,
        }
        arrays: dict[str, Any] = {
            f"census{place}": np.frombuffer(census.to_bytes(), np.uint8)
            for place, census in enumerate(self.censuses.values())
        }
        arrays["about"] = np.frombuffer(json_text(about, ascii_only=True).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays)  # the censuses are compressed already
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, where: object = "What another process has sent") -> State:
        """What `to_bytes` wrote.

        Args:
            content: All of it.
            where: Where it comes from, for what is said.

        Raises:
            InputError: It is something else, or a part of it is not as it was written.
        """
        said = f"{where} cannot be read as a scan's state"
        # A file that was cut off or changed is whatever numpy, zipfile and zlib make of it.
        with border(said, _TODO), np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            about = records.parse(arrays["about"].tobytes(), _About, said, _TODO)
            if records.parse(arrays["about"].tobytes(), dict[str, Any], said, _TODO).keys() != about.keys():
                raise ValueError("it has fields that this version does not know")
            censuses = {
                name: _checked(Census.from_bytes(arrays[f"census{place}"].tobytes()))
                for place, name in enumerate(about["categories"])
            }
            if len(arrays.files) != len(censuses) + 1:
                raise ValueError(f"it has {len(arrays.files)} parts for {len(censuses)} categories")
            if not all(0 <= rank < size and until >= 0 for rank, size, until in about["shares"]):
                raise ValueError("its shares of the documents are none")
        shares = [Share(*share) for share in about["shares"]]
        return cls(
            settings=cast(ScanSettings, about["settings"]),
            censuses=censuses,
            shares={(share.rank, share.size): share for share in shares},
            left_out=[LeftOut(*found) for found in about["left_out"]],
            n_left_out=about["n_left_out"],
            seconds=about["seconds"],
        )


def _checked(census: Census) -> Census:
    """The census; raises ValueError where an array is not of the type and shape that it is filled with."""
    widths = [len(found) for found in census.dim_maxima]
    like = Census.empty(census.places, widths, len(census.holding), len(census.seen), census.errors.shape)
    for item in fields(Census):
        mine, empty = getattr(census, item.name), getattr(like, item.name)
        if isinstance(empty, np.ndarray) and not _alike(mine, empty, any_length=item.name.startswith("document_")):
            raise ValueError(f"{item.name} is not what it should be")
    if not all(_alike(*pair) for pair in zip(census.dim_maxima, like.dim_maxima, strict=True)):
        raise ValueError("dim_maxima is not what it should be")
    if census.document_bins.shape != census.document_counts.shape:
        raise ValueError("document_counts is not what it should be")
    return census


def _alike(array: NDArray[Any], like: NDArray[Any], *, any_length: bool = False) -> bool:
    return array.dtype == like.dtype and (array.ndim == like.ndim if any_length else array.shape == like.shape)


def merged_bytes(first: bytes, second: bytes) -> bytes:
    """Two states as one."""
    state = State.from_bytes(first)
    state.absorb(State.from_bytes(second))
    return state.to_bytes()


def agree(kept: Mapping[str, Any], asked: Mapping[str, Any], where: object) -> None:
    """Raises InputError where figures were found under other settings."""
    differing = sorted(key for key in kept.keys() | asked.keys() if kept.get(key) != asked.get(key))
    if differing:
        said = ", ".join(f"{key} ({kept.get(key)!r}, now {asked.get(key)!r})" for key in differing)
        raise InputError(
            f"{where} holds a scan with other settings: {said}. Give the same, or another place with --out."
        )


def path_of(directory: Path, rank: int) -> Path:
    """Where a process keeps its state."""
    return directory / PATTERN.replace("*", str(rank))


def read(directory: Path, settings: ScanSettings) -> State:
    """What all processes of an earlier run have kept, as one state; an empty one where there was none.

    Raises:
        InputError: A file is damaged, or of other settings.
        OutputError: The directory cannot be read, or a file is not ours.
    """
    with _keeping(directory):
        atomic.require_writable(directory)
    try:
        paths = sorted(directory.glob(PATTERN))
        ours.require(paths)
        states = [(path, State.from_bytes(ours.read_bytes(path), path)) for path in paths]
    except OSError as error:
        raise OutputError(f"The scan in {directory} cannot be read: {reason(error)}.") from error
    whole = State(settings)
    # The one with most shares first: what a process was about to take over, and did, is in it already.
    for path, state in sorted(states, key=lambda item: -len(item[1].shares)):
        agree(state.settings, settings, path)
        if not state.shares or whole.includes(state):
            continue
        whole.absorb(state)
    return whole


def write(directory: Path, rank: int, state: State) -> None:
    """Keeps a process' state; a reader sees the old one or the new one, never a part.

    Raises:
        OutputError: There is no space, or no right to write.
    """
    with _keeping(directory):
        atomic.write_bytes(path_of(directory, rank), state.to_bytes())


@contextmanager
def _keeping(directory: Path) -> Iterator[None]:
    """Turns what the file system refuses into our error."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The scan cannot be kept in {directory}: {reason(error)}. What was kept before stands. Make room or give "
            "another place."
        ) from error


def remove_others(directory: Path, rank: int) -> None:
    """Removes the states of the processes whose figures this one has taken over."""
    for path in directory.glob(PATTERN):
        if path != path_of(directory, rank):
            path.unlink()
