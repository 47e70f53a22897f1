"""What is known of a model's activations over a set of documents, in a form in which two sets become one.

Every part adds up or is a maximum, so the order does not matter, nor how the documents were batched, shared among
processes or interrupted: that one property gives batching, resuming and distribution. Sums differ by the rounding of
float64; all else is exact.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melayer.census.observe import Observation, Place
from melayer.errors import InputError
from melayer.numerics.histogram import BINS, bins_of, middles

MOMENTS = 4
_ADDED = (
    "counts", "sums", "n_summed", "holding", "n_massive", "seen", "massive_seen", "totals", "errors", "energies",
)  # fmt: skip
_FIRST, _LATER = 0, 1


@dataclass(frozen=True)
class Window:
    """Where a sequence comes from."""

    document: int
    """Its place in the corpus, from 0."""
    number: int
    """Which of the document's sequences it is, from 0."""
    ids: tuple[int, ...]


@dataclass(eq=False)
class Census:
    """The figures of `K` places over some documents, on the host."""

    places: tuple[Place, ...]
    counts: NDArray[np.int64]
    """[K, BINS] histogram of |x|."""
    sums: NDArray[np.float64]
    """[K, 4] sums of x, x^2, x^3, x^4."""
    n_summed: NDArray[np.int64]
    """[K]"""
    maxima: NDArray[np.float32]
    """[K] the largest |x|, signed."""
    found_at: NDArray[np.int64]
    """[K, 5] its document, window, token, dimension and token id; -1 where nothing was seen."""
    dim_maxima: list[NDArray[np.float32]]
    """For each place [d]."""
    holding: NDArray[np.int64]
    """[n_layers] voting sequences in which the criterion holds at each block's output."""
    n_massive: NDArray[np.int64]
    """[n_layers] massive tokens at each block's output."""
    seen: NDArray[np.int64]
    """[vocabulary, 2] how often each token was first, and later, in a sequence."""
    massive_seen: NDArray[np.int64]
    """[vocabulary, 2] how often it was massive there, at any block's output."""
    totals: NDArray[np.int64]
    """[4] documents, sequences, sequences that vote, tokens."""
    errors: NDArray[np.float64]
    """[variants, linear inputs, formats, kinds] sums of squared errors; empty without formats."""
    energies: NDArray[np.float64]
    """[variants, linear inputs] sums of the squares that they are of."""
    document_bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """place * BINS + bin of the documents' maxima, ascending."""
    document_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """How many documents have their maximum there."""

    @classmethod
    def empty(
        cls,
        places: Sequence[Place],
        widths: Sequence[int],
        n_layers: int,
        vocabulary: int,
        errors: tuple[int, ...] = (0, 0, 0, 0),
    ) -> Census:
        """Of no documents at all.

        Args:
            places: What is observed.
            widths: The dimensions of each place.
            n_layers: The blocks whose outputs are observed.
            vocabulary: How many tokens there are.
            errors: The shape of `errors`.
        """
        count = len(places)
        return cls(
            places=tuple(places),
            counts=np.zeros((count, BINS), np.int64),
            sums=np.zeros((count, MOMENTS)),
            n_summed=np.zeros(count, np.int64),
            maxima=np.zeros(count, np.float32),
            found_at=np.full((count, 5), -1, np.int64),
            dim_maxima=[np.zeros(width, np.float32) for width in widths],
            holding=np.zeros(n_layers, np.int64),
            n_massive=np.zeros(n_layers, np.int64),
            seen=np.zeros((vocabulary, 2), np.int64),
            massive_seen=np.zeros((vocabulary, 2), np.int64),
            totals=np.zeros(4, np.int64),
            errors=np.zeros(errors),
            energies=np.zeros(errors[:2]),
        )

    def add(self, observed: Observation, windows: Sequence[Window], min_tokens: int) -> None:
        """Adds a batch, all but the documents' own maxima: a document may lie in several batches.

        Args:
            observed: What was kept of it.
            windows: Its sequences, in its order.
            min_tokens: From how many tokens on a sequence votes on the ME layer.
        """
        self.counts += observed.counts
        self.sums += observed.sums
        self.n_summed += observed.n_summed
        # In the order of the corpus, so that of equal values the first is the one that stands first there.
        order = sorted(range(len(windows)), key=lambda row: (windows[row].document, windows[row].number))
        sizes = np.where(np.isnan(observed.maxima), np.inf, np.abs(observed.maxima))
        best = np.array(order)[sizes[:, order].argmax(axis=1)]
        for place, row in enumerate(best.tolist()):
            if self.found_at[place, 0] >= 0 and sizes[place, row] < abs(self.maxima[place]):
                continue
            token, window = int(observed.tokens[place, row]), windows[row]
            dim = int(observed.dims[place, row])
            found = np.array([window.document, window.number, token, dim, window.ids[token]])
            self._raise_maximum(place, observed.maxima[place, row], found)
        for mine, theirs in zip(self.dim_maxima, observed.dim_maxima, strict=True):
            np.maximum(mine, theirs, out=mine)
        lengths = np.array([len(window.ids) for window in windows])
        votes = np.flatnonzero(lengths >= min_tokens)
        self.totals += [0, len(windows), len(votes), lengths.sum()]
        for window in windows:
            self.seen[window.ids[0], _FIRST] += 1
            np.add.at(self.seen[:, _LATER], list(window.ids[1:]), 1)
        if len(self.holding):
            self.holding += observed.massive[:, votes].any(axis=2).sum(axis=1)
            self.n_massive += observed.massive.sum(axis=(1, 2))
            for row, token in zip(*np.nonzero(observed.massive.any(axis=0)), strict=True):
                self.massive_seen[windows[row].ids[token], _LATER if token else _FIRST] += 1

    def add_documents(self, maxima: NDArray[np.float32]) -> None:
        """Adds the largest |x| of whole documents, [K, documents]; NaN counts as infinite."""
        count = maxima.shape[1]
        self.totals[0] += count
        bins = bins_of(maxima) + np.arange(len(self.places))[:, None] * BINS
        self._add_bins(bins.ravel(), np.ones(bins.size, np.int64))

    def _add_bins(self, bins: NDArray[np.int64], counted: NDArray[np.int64]) -> None:
        found, inverse = np.unique(np.concatenate([self.document_bins, bins]), return_inverse=True)
        sums = np.zeros(len(found), np.int64)
        np.add.at(sums, inverse, np.concatenate([self.document_counts, counted]))
        self.document_bins, self.document_counts = found, sums

    def absorb(self, other: Census) -> None:
        """Adds the documents of another census of the same places."""
        assert self.places == other.places
        for name in _ADDED:
            mine: NDArray[Any] = getattr(self, name)
            mine += getattr(other, name)
        for place in range(len(self.places)):
            self._raise_maximum(place, other.maxima[place], other.found_at[place])
            np.maximum(self.dim_maxima[place], other.dim_maxima[place], out=self.dim_maxima[place])
        self._add_bins(other.document_bins, other.document_counts)

    def _raise_maximum(self, place: int, value: np.float32, found: NDArray[np.int64]) -> None:
        pair = np.array([self.maxima[place], value]), np.stack([self.found_at[place], found])
        if found[0] >= 0 and (self.found_at[place, 0] < 0 or _best(*pair) == 1):
            self.maxima[place], self.found_at[place] = value, found

    def document_maxima(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bins that hold documents' maxima at one place, ascending, and how many each holds."""
        first, last = np.searchsorted(self.document_bins, [place * BINS, (place + 1) * BINS])
        return self.document_bins[first:last] - place * BINS, self.document_counts[first:last]

    def interval(self, place: int, confidence: float = 0.95) -> tuple[float, float] | None:
        """A bootstrap interval of the largest |x| over documents, to 1 %; None without documents.

        Not by drawing: the maximum of n documents drawn with replacement stays within a bin with probability
        (share of documents up to it) ** n. It cannot reach above what was seen, which is what bootstrapping a maximum
        means; its lower end says on how few documents the maximum rests.
        """
        bins, counted = self.document_maxima(place)
        if not len(bins):
            return None
        reached = (np.cumsum(counted) / counted.sum()) ** counted.sum()
        tail = (1 - confidence) / 2
        low, high = (int(np.searchsorted(reached, share)) for share in (tail, 1 - tail))
        return self._middle(place, int(bins[low])), self._middle(place, int(bins[min(high, len(bins) - 1)]))

    def growth(self, place: int, points: int = 24) -> list[tuple[int, float]]:
        """The expected largest |x| of so many documents, drawn without replacement, for several numbers of them."""
        bins, counted = self.document_maxima(place)
        total = int(counted.sum())
        if not total:
            return []
        sizes = np.unique(np.geomspace(1, total, points).round().astype(int))
        below = np.cumsum(counted)
        values = np.array([self._middle(place, int(found)) for found in bins])
        grown = []
        for size in sizes:
            reached = np.array([_share_of_draws(int(count), total, int(size)) for count in below])
            grown.append((int(size), float(np.diff(reached, prepend=0.0) @ values)))
        return grown

    def _middle(self, place: int, found: int) -> float:
        """A value of the bin; where it holds the maximum itself, that."""
        largest = abs(float(self.maxima[place]))
        return largest if found == bins_of(self.maxima[place : place + 1])[0] else float(middles()[found])

    def moments(self, place: int) -> tuple[float | None, float | None, float | None]:
        """Mean, variance and kurtosis (3 for a normal distribution); None where there are no or no varying values."""
        n = int(self.n_summed[place])
        if not n or not np.isfinite(self.sums[place]).all():
            return None, None, None
        m1, m2, m3, m4 = (float(value) / n for value in self.sums[place])
        variance = m2 - m1**2
        if variance <= 0:
            return m1, 0.0, None
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return m1, variance, fourth / variance**2

    def to_bytes(self) -> bytes:
        """All of it, compressed; what is kept on the disk and sent to another process."""
        rows, columns = self.counts.nonzero()
        tokens = np.flatnonzero(self.seen.any(axis=1))
        arrays = {name: getattr(self, name) for name in _ADDED if name not in ("counts", "seen", "massive_seen")}
        arrays |= {
            "places": np.array([f"{site}/{'' if layer is None else layer}" for site, layer in self.places], dtype=str),
            "count_places": (rows * BINS + columns).astype(np.int64),
            "count_values": self.counts[rows, columns],
            "tokens": tokens,
            "token_counts": np.concatenate([self.seen[tokens], self.massive_seen[tokens]], axis=1),
            "vocabulary": np.array(len(self.seen)),
            "maxima": self.maxima,
            "found_at": self.found_at,
            "widths": np.array([len(found) for found in self.dim_maxima]),
            "dim_maxima": np.concatenate(self.dim_maxima) if self.dim_maxima else np.zeros(0, np.float32),
            "document_bins": self.document_bins,
            "document_counts": self.document_counts,
        }
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Census:
        """What `to_bytes` wrote."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            kept: Mapping[str, NDArray[Any]] = {name: arrays[name] for name in arrays.files}
        places = []
        for name in kept["places"]:
            site, _, layer = str(name).partition("/")
            places.append(Place(site, int(layer) if layer else None))
        made = cls.empty(
            places, kept["widths"].tolist(), len(kept["holding"]), int(kept["vocabulary"]), kept["errors"].shape
        )
        for name in _ADDED:
            if name in kept:
                setattr(made, name, kept[name])
        made.counts.reshape(-1)[kept["count_places"]] = kept["count_values"]
        made.seen[kept["tokens"]], made.massive_seen[kept["tokens"]] = np.split(kept["token_counts"], 2, axis=1)
        made.maxima, made.found_at = kept["maxima"], kept["found_at"]
        made.dim_maxima = np.split(kept["dim_maxima"], np.cumsum(kept["widths"])[:-1]) if places else []
        made.document_bins, made.document_counts = kept["document_bins"], kept["document_counts"]
        return made


def merged(parts: Sequence[Census]) -> Census:
    """One census of the documents of all; the parts stay as they are.

    Raises:
        InputError: They are of different places.
    """
    if any(part.places != parts[0].places for part in parts):
        raise InputError("These are censuses of different sites or models, so they cannot become one.")
    whole = copy.deepcopy(parts[0])
    for part in parts[1:]:
        whole.absorb(part)
    return whole


def _best(values: NDArray[np.float32], found: NDArray[np.int64]) -> int:
    """The largest |value|, NaN above all; of equal ones that which stands first in the corpus."""
    sizes = np.where(np.isnan(values), np.inf, np.abs(values))
    largest: list[int] = np.flatnonzero(sizes == sizes.max()).tolist()
    return min(largest, key=lambda place: tuple(found[place][:4].tolist()))


def _share_of_draws(below: int, total: int, size: int) -> float:
    """The probability that `size` documents, drawn without replacement, all are among `below` of them."""
    if below < size:
        return 0.0
    logs = math.lgamma(below + 1) - math.lgamma(below - size + 1) - math.lgamma(total + 1)
    return math.exp(logs + math.lgamma(total - size + 1))
