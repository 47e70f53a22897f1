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

from melayer.data.rows import encode, windows
from melayer.data.texts import builtin_texts
from melayer.errors import InputError, collected
from melayer.interventions.mask import Selector, WeMask
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.perplexity import PerplexityResult, perplexity
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.rigidity.rigidity import rigidity
from melayer.measurements.sinks.result import SinksResult
from melayer.measurements.sinks.sinks import sinks
from melayer.model import wiring
from melayer.model.provenance import fingerprint
from melayer.runs import resume as finished
from melayer.runs.progress import Bar, Progress
from melayer.studies.sweep.result import SweepPoint, SweepResult
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATES = tuple(place / 10 for place in range(11))
SELECTORS: tuple[Selector, ...] = ("weight", "activation", "random")
FILE = "sweep.jsonl"
"""Where the command keeps the finished settings, in the directory of the report."""


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
    decoder = wiring.read(model, parts=parts)
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
