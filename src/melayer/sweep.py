"""What a mask does as it grows: perplexity, sinks, rigidity and effective rank for each selector and rate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from melayer import architecture, finished
from melayer.errors import InputError, collected
from melayer.inputs import builtin_texts, encode, windows
from melayer.locate import Criterion, LocateResult, Progress, locate
from melayer.mask import Selector, WeMask
from melayer.perplexity import PerplexityResult, perplexity
from melayer.progress import Bar
from melayer.provenance import ModelInfo, fingerprint
from melayer.rigidity import RigidityResult, rigidity
from melayer.sinks import SinksResult, sinks
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATES = tuple(place / 10 for place in range(11))
SELECTORS: tuple[Selector, ...] = ("weight", "activation", "random")
FILE = "sweep.jsonl"
"""Where the command keeps the finished settings, in the directory of the report."""
MILD = 1.05
"""A mask that raises the perplexity by no more than this factor is called mild."""


@dataclass(frozen=True)
class SweepPoint:
    """The figures of one mask, or of the plain model. None stands where there is nothing finite to measure."""

    selector: str | None
    """None for the plain model."""
    rate: float
    perplexity: float
    sink_rate: float
    """The share of (sequence, layer, head) in which key 0 is a sink."""
    sink_rate_after_me: float | None
    """Over the blocks after the plain model's ME layer, so that settings compare; None where there is none."""
    sink_rate_by_layer: tuple[float | None, ...]
    alpha: tuple[tuple[float | None, ...] | None, ...]
    """[layer][head] mean of the attention that key 0 draws; None for a layer without softmax attention."""
    cosine_next: tuple[float | None, ...]
    """[n_layers - 1] the massive token's state at each block's output against that at the next one's."""
    cosine_peak: tuple[float | None, ...]
    """[n_layers] the same against its state where the norm peaks."""
    cosine_rigid: float | None
    """Mean of `cosine_next` from the ME layer to the last block before the plain model erases the massive state."""
    rank_attn_in: float | None
    """Effective rank of what attention reads, mean over the blocks after the ME layer."""
    rank_attn_in_without: float | None
    """The same without the massive tokens."""
    rank_block_out: float | None
    """Effective rank of the residual stream, mean over the blocks after the ME layer."""
    rank_block_out_without: float | None

    @property
    def label(self) -> str:
        """What to call it."""
        return "plain" if self.selector is None else f"{self.selector} {self.rate:g}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepPoint:
        """The point that `asdict` and JSON made these values of."""
        rows = {key: tuple(values[key]) for key in ("sink_rate_by_layer", "cosine_next", "cosine_peak")}
        alpha = tuple(None if row is None else tuple(row) for row in values["alpha"])
        return cls(**{**values, **rows, "alpha": alpha})


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` found. Layers, heads and keys are 0-based."""

    model: ModelInfo
    settings: dict[str, Any]
    me_layer: int
    T: int
    epsilon: float
    n_sequences: int
    plain: SweepPoint
    masked: tuple[SweepPoint, ...]
    """By selector in the order asked for, then by rate."""
    notes: tuple[str, ...]
    located: LocateResult = field(compare=False, repr=False)
    """What `locate` found on the plain model, for a report; not part of `to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": self.settings,
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "T": self.T,
            "epsilon": self.epsilon,
            "n_sequences": self.n_sequences,
            "plain": asdict(self.plain),
            "masked": [asdict(point) for point in self.masked],
            "notes": list(self.notes),
        }

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        """The plain model, then the masks."""
        return (self.plain, *self.masked)

    @property
    def mild(self) -> tuple[SweepPoint, ...]:
        """The masks that raise the perplexity by at most 5 %."""
        return tuple(point for point in self.masked if point.perplexity <= MILD * self.plain.perplexity)

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        plain = self.plain
        start = f"Without a mask the perplexity is {plain.perplexity:,.2f}"
        if plain.sink_rate_after_me is not None:
            start += f" and the sink rate after the ME layer (block {self.me_layer}) {plain.sink_rate_after_me:.1%}"
        if not self.masked:
            return f"{start}; no mask was measured."
        if not self.mild:
            best = min(self.masked, key=lambda point: point.perplexity)
            return (
                f"{start}; each of the {len(self.masked)} masks raises the perplexity by more than 5 %, {best.label} "
                f"least ({self.change(best):+.1%})."
            )
        start += f"; {len(self.mild)} of {len(self.masked)} masks raise the perplexity by at most 5 %"
        rates = [(p.sink_rate_after_me, p) for p in self.mild if p.sink_rate_after_me is not None]
        if not rates:
            return f"{start}."
        rate, lowest = min(rates, key=lambda pair: pair[0])
        return (
            f"{start}, and of these {lowest.label} leaves the fewest sinks: {rate:.1%} at a perplexity of "
            f"{lowest.perplexity:,.2f} ({self.change(lowest):+.1%})."
        )

    def change(self, point: SweepPoint) -> float:
        """The relative change of the perplexity against the plain model's."""
        return point.perplexity / self.plain.perplexity - 1


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rates: Sequence[float] = RATES,
    selectors: Sequence[str] = SELECTORS,
    strength: float = 1.0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    T: int = 64,
    epsilon: float = 0.3,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> SweepResult:
    """Perplexity, sinks, rigidity and effective rank of the plain model and under each mask of a grid.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        rates: Shares of the dimensions. The plain model, which is rate 0 of any selector, is measured once, also
            where 0 is not among them.
        selectors: How the dimensions are chosen, see `WeMask`.
        strength: How much of a masked entry is taken away.
        layers: The masked blocks; by default all with softmax attention after the ME layer.
        seed: Of selector `random`.
        T: Tokens in each sequence, for perplexity and sinks alike.
        epsilon: A head is a sink head where key 0 draws more than this.
        texts: What to run; by default a small varied set that melayer brings along.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: What counts as massive, and as the ME layer, which is located once, on the plain model.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `architecture.read` does not find by itself.
        name: What to call the model in the result.
        progress: Called with the tokens done and the tokens in all.
        resume: A file that each finished setting is appended to at once. The settings that it holds already are
            not measured again.

    Raises:
        InputError: There is no ME layer, an option is out of range, a selector does not work on this model, or the
            file is of another sweep.
        ArchitectureError: The model has no softmax attention, or a part of it was not found.
        OutputError: The file cannot be written.

    Example:
        >>> melayer.sweep(model, tokenizer, rates=[0.5], selectors=["weight"]).sentence  # doctest: +SKIP
    """
    grid = check_grid(rates, selectors)
    if not 0 <= epsilon <= 1:
        raise InputError(f"epsilon is {epsilon}; expected a share of attention between 0 and 1.")
    given, texts = texts is not None, builtin_texts() if texts is None else texts
    decoder = architecture.read(model, parts=parts)
    n_texts = sum(map(len, encode(tokenizer, texts, max_positions=decoder.max_positions, bos=bos)))
    rows = windows(tokenizer, texts, T, max_positions=decoder.max_positions, bos=bos)
    options: dict[str, Any] = {"strength": strength, "seed": seed, "layers": None if layers is None else tuple(layers)}
    # Whatever is wrong with a mask is wrong before anything has run, too: block 0 stands for the ME layer.
    for chosen in selectors:
        trial: dict[str, Any] = {**options, "selector": chosen, "rate": max(rates), "me_layer": 0}
        with WeMask(**trial).apply(model, parts=parts):
            pass
    criterion = criterion or Criterion()
    asked: dict[str, Any] = {
        "rates": sorted({float(rate) for rate in rates}),
        "selectors": list(dict.fromkeys(selectors)),
        "strength": strength,
        "layers": None if layers is None else sorted({int(layer) for layer in layers}),
        "seed": seed,
        "criterion": asdict(criterion),
        "texts": "given" if given else "built-in",
        "texts_sha256": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
        "bos": {"asked": bos, "sequences_with_bos": sum(row.has_bos for row in rows)},
        "layers_counted_from": 0,
    }
    # What the figures of a setting depend on. The grid itself is left out: it may grow from one run to the next.
    subject = {key: value for key, value in asked.items() if key not in ("rates", "selectors")}
    subject |= {"T": T, "epsilon": epsilon, "fingerprint": fingerprint(decoder.model), "melayer_version": __version__}
    subject["dtype"] = str(decoder.model.dtype)
    kept = _Kept() if resume is None else _Kept.opened(Path(resume), subject)
    todo = [key for key in ((None, 0.0), *grid) if key not in kept.points]
    bar = Bar(progress, n_texts + len(todo) * (n_texts + 2 * T * len(rows)))
    shared: dict[str, Any] = {"texts": texts, "bos": bos, "max_batch_tokens": max_batch_tokens, "parts": parts}
    shared["name"] = name
    located = locate(model, tokenizer, criterion=criterion, progress=bar.part(n_texts), **shared)
    if located.me_layer is None:
        raise InputError("locate found no ME layer in this model with these texts, so there is nothing to sweep.")
    for selector, rate in todo:
        mask = None
        if selector is not None:
            mask = WeMask.from_located(located, selector=selector, rate=rate, **options)
        with collected() as said, nullcontext() if mask is None else mask.apply(model, parts=parts):
            drawn = sinks(
                model, tokenizer, T=T, epsilon=epsilon, criterion=criterion, progress=bar.part(T * len(rows)), **shared
            )
        # Each context of a mask says once whether it has a target; only the sequences measured above matter.
        with collected(), nullcontext() if mask is None else mask.apply(model, parts=parts):
            predicted = perplexity(model, tokenizer, T=T, progress=bar.part(T * len(rows)), **shared)
            # The least number of first tokens: what they say does not depend on the mask.
            rigid = rigidity(model, tokenizer, located=located, n_first_tokens=2, progress=bar.part(n_texts), **shared)
        kept.add(_point(selector, rate, located, predicted, drawn, rigid), said)
    keys = [(None, 0.0), *grid]
    return SweepResult(
        model=located.model,
        settings=asked,
        me_layer=located.me_layer,
        T=T,
        epsilon=epsilon,
        n_sequences=len(rows),
        plain=kept.points[keys[0]],
        masked=tuple(kept.points[key] for key in keys[1:]),
        notes=tuple(dict.fromkeys([*located.notes, *(note for key in keys for note in kept.notes[key])])),
        located=located,
    )


_Key = tuple[str | None, float]


def check_grid(rates: Sequence[float], selectors: Sequence[str]) -> list[_Key]:
    """The masks of a grid as (selector, rate); rate 0 is no mask.

    Raises:
        InputError: There is no rate or no selector, or one of them is none.
    """
    for what, given in (("rates", rates), ("selectors", selectors)):
        if not given:
            raise InputError(f"There are no {what} to sweep over. Give at least one.")
    for rate in rates:
        if not 0 <= rate <= 1:
            raise InputError(f"rate is {rate}; expected a share between 0 and 1.")
    known = [selector for selector in get_args(Selector) if selector != "dims"]
    for selector in selectors:
        if selector not in known:
            raise InputError(f"selector is {selector!r}; expected one of {', '.join(known)}.")
    shares = sorted({float(rate) for rate in rates if rate > 0})
    return [(selector, rate) for selector in dict.fromkeys(selectors) for rate in shares]


def _point(
    selector: str | None,
    rate: float,
    located: LocateResult,
    predicted: PerplexityResult,
    drawn: SinksResult,
    rigid: RigidityResult,
) -> SweepPoint:
    assert located.me_layer is not None
    assert rigid.rigid_until is not None
    held = [value for value in rigid.cosine_next[located.me_layer : rigid.rigid_until] if value is not None]
    read, out = rigid.mean_rank("attn_in"), rigid.mean_rank("block_out")
    return SweepPoint(
        selector=selector,
        rate=rate,
        perplexity=predicted.perplexity,
        sink_rate=drawn.rate,
        sink_rate_after_me=_rate_after(drawn, located.me_layer),
        sink_rate_by_layer=drawn.rate_by_layer,
        alpha=drawn.alpha,
        cosine_next=rigid.cosine_next,
        cosine_peak=rigid.cosine_peak,
        cosine_rigid=float(np.mean(held)) if held else None,
        rank_attn_in=read[0],
        rank_attn_in_without=read[1],
        rank_block_out=out[0],
        rank_block_out_without=out[1],
    )


def _rate_after(drawn: SinksResult, me_layer: int) -> float | None:
    """The sink rate over the blocks after the plain model's ME layer; that under the mask may be another."""
    after = [
        (rate, len(alpha))
        for rate, alpha in list(zip(drawn.rate_by_layer, drawn.alpha, strict=True))[me_layer + 1 :]
        if rate is not None and alpha is not None
    ]
    return sum(rate * heads for rate, heads in after) / sum(heads for _, heads in after) if after else None


# --- what is finished ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Kept:
    """The finished settings with what was noted, in memory and, a line each, in a file."""

    path: Path | None = None
    points: dict[_Key, SweepPoint] = field(default_factory=dict)
    notes: dict[_Key, list[str]] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, subject: dict[str, Any]) -> _Kept:
        """What the file holds; it is made if it is missing.

        Raises:
            InputError: It is of another sweep, or of none.
            OutputError: It cannot be read or written.
        """
        kept = cls(path)
        for point, notes in finished.begun(path, "sweep", subject, _read):
            kept._take(point, notes)
        return kept

    def add(self, point: SweepPoint, notes: list[str]) -> None:
        """Keeps a finished setting, on the disk before the next one begins."""
        self._take(point, notes)
        if self.path is not None:
            finished.keep(self.path, "sweep", {"point": asdict(point), "notes": notes})

    def _take(self, point: SweepPoint, notes: list[str]) -> None:
        self.points[point.selector, point.rate] = point
        self.notes[point.selector, point.rate] = notes


def _read(values: dict[str, Any]) -> tuple[SweepPoint, list[str]]:
    return SweepPoint.from_dict(values["point"]), list(values["notes"])
