"""From what a scan has counted to what it says: rows for each place, the ME layer, the massive tokens, what is lost."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from melayer.census.counts import Census, merged
from melayer.census.observe import SITES, Place
from melayer.census.rounding_error import KINDS
from melayer.census.state import ScanSettings, State
from melayer.data.corpus import LeftOut
from melayer.data.documents import MAX_NAMED
from melayer.data.rows import token_text, visible
from melayer.measurements.criterion import Criterion, find_me_layer
from melayer.model.provenance import ModelInfo
from melayer.numerics import histogram
from melayer.numerics.finite import finite
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
CONFIDENCE = 0.95
_TOP_DIMS = 5
_MAX_TOKENS_LISTED = 50


@dataclass(frozen=True)
class PlaceRow:
    """What one site of one block comes to over all documents."""

    site: str
    layer: int | None
    """None for the embedding's output and the final norm's."""
    max_abs: float | None
    """None where something is not finite."""
    value: float | None
    """The same, signed."""
    interval: tuple[float, float] | None
    """Bootstrap interval of the maximum over documents, to 1 %; it cannot reach above what was seen."""
    document: int
    window: int
    """Which of the document's sequences."""
    token_index: int
    """In that sequence."""
    token: str
    dim: int
    n_values: int
    mean: float | None
    variance: float | None
    kurtosis: float | None
    """3 for a normal distribution."""
    quantiles: Mapping[str, float | None]
    """Of |x|, to 1 %."""
    beyond_fp16: int
    """Values that become infinite in float16."""
    top_dims: tuple[tuple[int, float | None], ...]
    """The dimensions with the largest |x|, each with it."""


@dataclass(frozen=True)
class MassiveToken:
    """A token that was massive at some block's output."""

    token_id: int
    token: str
    kind: str
    """`delimiter` (punctuation, white space, special tokens) or `word`."""
    first: int
    """How often it was massive as the first token of a sequence."""
    later: int
    seen_first: int
    """How often it was first."""
    seen_later: int


@dataclass(frozen=True)
class Loss:
    """What rounding one linear input to one format loses, in ordinary tokens."""

    variant: str
    """`plain`, or `masked`."""
    site: str
    layer: int
    format: str
    kind: str
    """What shares a scale; see `reconstruction.KINDS`."""
    error: float | None
    """sqrt(sum (x - Q(x))^2 / sum x^2)."""


@dataclass(frozen=True)
class Part:
    """The figures of one category of documents, or of all."""

    name: str
    documents: int
    sequences: int
    voting: int
    """Sequences long enough to vote on the ME layer."""
    tokens: int
    me_layer: int | None
    holding: tuple[int, ...]
    """For each block the voting sequences in which the criterion holds at its output."""
    n_massive: tuple[int, ...]
    """For each block the massive tokens at its output."""
    places: tuple[PlaceRow, ...]
    massive: tuple[MassiveToken, ...]
    """The most frequent first."""
    n_massive_first: int
    """Massive tokens that were the first of their sequence, at any block's output."""
    n_massive_delimiters: int
    """Later ones that are delimiters."""
    n_massive_words: int
    """All others."""
    losses: tuple[Loss, ...]
    growth: Mapping[str, tuple[tuple[int, float], ...]]
    """For each site, at its block with the largest |x|: the expected maximum of so many documents."""
    census: Census | None = field(default=None, compare=False, repr=False)
    """What the figures come from; not part of `to_dict()`."""

    def by_site(self) -> list[PlaceRow]:
        """For each site the row of the block with the largest |x|, in the order of the sites."""
        found: dict[str, PlaceRow] = {}
        for row in self.places:
            known = found.get(row.site)
            if known is None or _size(row) > _size(known):
                found[row.site] = row
        return [found[site] for site in SITES if site in found]

    def worst(self, variant: str, site: str, format: str, kind: str) -> tuple[float, Loss] | None:
        """Of the errors of all blocks the median, and the largest; None where there are none."""
        asked = (variant, site, format, kind)
        found = [loss for loss in self.losses if (loss.variant, loss.site, loss.format, loss.kind) == asked]
        known = [loss for loss in found if loss.error is not None]
        if not known:
            return None
        return float(np.median([loss.error for loss in known])), max(known, key=lambda loss: loss.error or 0.0)


@dataclass(frozen=True)
class ScanResult:
    """What `scan` found. Layers are 0-based throughout."""

    model: ModelInfo
    criterion: Criterion
    settings: ScanSettings
    total: Part
    categories: tuple[Part, ...]
    """Empty unless a column of categories was named."""
    left_out: tuple[LeftOut, ...]
    """The first documents that could not be read."""
    n_left_out: int
    seconds: float
    """Of all processes together."""
    n_processes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": self.settings,
            "sentence": self.sentence,
            "total": _plain(self.total),
            "categories": [_plain(part) for part in self.categories],
            "left_out": [asdict(found) for found in self.left_out],
            "n_left_out": self.n_left_out,
            "seconds": self.seconds,
            "n_processes": self.n_processes,
            "notes": list(self.notes),
        }

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        total = self.total
        over = f"Over {total.documents:,} documents ({total.tokens:,} tokens)"
        broken = [row for row in total.places if row.max_abs is None]
        if broken:
            return (
                f"{over}, {_where(broken[0])} holds NaN or infinity in {self.model.dtype}, first in document "
                f"{broken[0].document}, token {broken[0].token_index}."
            )
        largest = max(total.places, key=lambda row: row.max_abs or 0.0)
        beyond = sum(row.beyond_fp16 for row in total.places)
        fp16 = f"{beyond:,} values would overflow float16" if beyond else "nothing would overflow float16"
        me = "there is no ME layer" if total.me_layer is None else f"the ME layer is block {total.me_layer} (0-based)"
        return (
            f"{over} the largest activation is |x| = {largest.max_abs:,.1f} in {_where(largest)}, at token "
            f"{largest.token_index} (“{visible(largest.token)}”), dimension {largest.dim}; {me}; {fp16}."
        )


def _size(row: PlaceRow) -> float:
    return math.inf if row.max_abs is None else row.max_abs


def _where(row: PlaceRow) -> str:
    return row.site if row.layer is None else f"{row.site} of block {row.layer}"


def _plain(part: Part) -> dict[str, Any]:
    found = {key: value for key, value in vars(part).items() if key != "census"}
    for key in ("places", "massive", "losses"):
        found[key] = [asdict(row) for row in found[key]]
    return {**found, "growth": {site: [list(point) for point in curve] for site, curve in part.growth.items()}}


def conclude(
    state: State,
    model: ModelInfo,
    criterion: Criterion,
    tokenizer: PreTrainedTokenizerBase,
    linear: Sequence[Place],
    *,
    n_processes: int,
    notes: Sequence[str] = (),
) -> ScanResult:
    """The result of what was counted.

    Args:
        state: Of all processes.
        model: What was measured.
        criterion: What counts as massive.
        tokenizer: For the tokens' texts.
        linear: The linear inputs whose errors were measured.
        n_processes: How many shared the work.
        notes: On how the corpus was read.
    """
    names = sorted(state.censuses)
    formats = state.settings["formats"]
    total = _part("all", merged([state.censuses[name] for name in names]), criterion, tokenizer, linear, formats)
    categories: tuple[Part, ...] = ()
    if state.settings["data"]["category"] is not None:
        categories = tuple(_part(name, state.censuses[name], criterion, tokenizer, linear, formats) for name in names)
    said = [*notes]
    if state.n_left_out:
        said.append(
            f"Documents left out: {state.n_left_out:,}: "
            + "; ".join(f"document {found.index} ({found.reason})" for found in state.left_out[:MAX_NAMED])
            + ("." if state.n_left_out <= MAX_NAMED else f"; and {state.n_left_out - MAX_NAMED:,} more.")
        )
    if not total.voting:
        said.append(
            f"The criterion is not meaningful here: no sequence has {criterion.min_tokens} tokens, so none votes."
        )
    return ScanResult(
        model=model,
        criterion=criterion,
        settings=state.settings,
        total=total,
        categories=categories,
        left_out=tuple(state.left_out),
        n_left_out=state.n_left_out,
        seconds=state.seconds,
        n_processes=n_processes,
        notes=tuple(said),
    )


def _part(
    name: str,
    census: Census,
    criterion: Criterion,
    tokenizer: PreTrainedTokenizerBase,
    linear: Sequence[Place],
    formats: Sequence[str],
) -> Part:
    documents, sequences, voting, tokens = map(int, census.totals)
    rows = tuple(_row(census, place, tokenizer) for place in range(len(census.places)))
    massive, kinds = _massive(census, tokenizer)
    return Part(
        name=name,
        documents=documents,
        sequences=sequences,
        voting=voting,
        tokens=tokens,
        me_layer=find_me_layer(census.holding, voting, criterion),
        holding=tuple(census.holding.tolist()),
        n_massive=tuple(census.n_massive.tolist()),
        places=rows,
        massive=massive[:_MAX_TOKENS_LISTED],
        n_massive_first=kinds["first"],
        n_massive_delimiters=kinds["delimiter"],
        n_massive_words=kinds["word"],
        losses=tuple(_losses(census, linear, formats)),
        growth=_growth(census, rows),
        census=census,
    )


def _row(census: Census, place: int, tokenizer: PreTrainedTokenizerBase) -> PlaceRow:
    site, layer = census.places[place]
    document, window, token, dim, token_id = map(int, census.found_at[place])
    value = finite(census.maxima[place])
    mean, variance, kurtosis = census.moments(place)
    by_size = np.argsort(-np.nan_to_num(census.dim_maxima[place], nan=np.inf), kind="stable")[:_TOP_DIMS]
    counted = census.counts[place]
    return PlaceRow(
        site=site,
        layer=layer,
        max_abs=None if value is None else abs(value),
        value=value,
        interval=None if value is None else census.interval(place, CONFIDENCE),
        document=document,
        window=window,
        token_index=token,
        token=token_text(tokenizer, token_id),
        dim=dim,
        n_values=int(counted.sum()),
        mean=mean,
        variance=variance,
        kurtosis=kurtosis,
        quantiles={f"{share:g}": finite(histogram.quantile(counted, share)) for share in QUANTILES},
        beyond_fp16=histogram.overflowing(counted),
        top_dims=tuple((int(found), finite(census.dim_maxima[place][found])) for found in by_size),
    )


def _massive(census: Census, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[MassiveToken, ...], dict[str, int]]:
    special = set(tokenizer.all_special_ids)
    found = []
    for token in np.flatnonzero(census.massive_seen.any(axis=1)).tolist():
        text = token_text(tokenizer, token)
        kind = "delimiter" if token in special or _delimits(text) else "word"
        first, later = census.massive_seen[token].tolist()
        found.append(MassiveToken(token, text, kind, first, later, *census.seen[token].tolist()))
    found.sort(key=lambda row: (-row.first - row.later, row.token_id))
    kinds = {"first": sum(row.first for row in found)}
    kinds |= {kind: sum(row.later for row in found if row.kind == kind) for kind in ("delimiter", "word")}
    return tuple(found), kinds


def _delimits(text: str) -> bool:
    """Whether a token is nothing but white space, punctuation or symbols."""
    return all(character.isspace() or unicodedata.category(character)[0] in "PSZC" for character in text)


def _losses(census: Census, linear: Sequence[Place], formats: Sequence[str]) -> list[Loss]:
    found = []
    for variant, name in zip(range(len(census.errors)), ("plain", "masked"), strict=False):
        for at, place in enumerate(linear):
            energy = float(census.energies[variant, at])
            for number, format in enumerate(formats):
                for kind, label in enumerate(KINDS):
                    squared = float(census.errors[variant, at, number, kind])
                    error = math.sqrt(squared / energy) if energy else None
                    assert place.layer is not None
                    found.append(Loss(name, place.site, place.layer, format, label, error))
    return found


def _growth(census: Census, rows: Sequence[PlaceRow]) -> dict[str, tuple[tuple[int, float], ...]]:
    largest: dict[str, int] = {}
    for place, row in enumerate(rows):
        if row.site not in largest or _size(row) > _size(rows[largest[row.site]]):
            largest[row.site] = place
    return {site: tuple(census.growth(place)) for site, place in largest.items() if rows[place].max_abs is not None}
