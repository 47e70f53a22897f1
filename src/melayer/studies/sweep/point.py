"""One setting of a sweep: its mask, what is measured under it, and the figures that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from melayer.errors import collected
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.perplexity import PerplexityResult, perplexity_on
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.rigidity.rigidity import rigidity_on
from melayer.measurements.sinks.result import SinksResult
from melayer.measurements.sinks.sinks import sinks_on
from melayer.model.subject import Subject
from melayer.runs.progress import Bar
from melayer.studies.sink_rate import sink_rate_after
from melayer.studies.sweep.result import SweepPoint

Key = tuple[str | None, float]
"""A setting: the selector and the rate of its mask; (None, 0.0) is the plain model."""


@dataclass(frozen=True)
class MaskGrid:
    """What the masks of a sweep have in common."""

    strength: float
    layers: tuple[int, ...] | None
    """The masked blocks; None for all with softmax attention after the ME layer."""
    seed: int

    def require_fit(self, subject: Subject, selector: str, rate: float) -> None:
        """Raises InputError where such a mask does not fit the model; block 0 stands for the ME layer."""
        with under(subject, WeMask(selector=selector, rate=rate, me_layer=0, **self._options)):  # type: ignore[arg-type]
            pass

    def mask(self, located: LocateResult, key: Key) -> WeMask | None:
        """The mask of a setting; None for the plain model."""
        selector, rate = key
        if selector is None:
            return None
        return WeMask.from_located(located, selector=selector, rate=rate, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"strength": self.strength, "layers": self.layers, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class PointSettings:
    """What every setting is measured on, and how."""

    texts: Sequence[str]
    bos: bool | None
    criterion: Criterion
    T: int
    epsilon: float
    max_batch_tokens: int
    n_tokens: int
    """Of the texts as they are."""
    n_tokens_cut: int
    """Of the same cut into sequences of T."""


def under(subject: Subject, mask: WeMask | None) -> AbstractContextManager[None]:
    """The mask, if there is one, is at work on the model inside the context."""
    return nullcontext() if mask is None else mask.apply(subject.decoder)


def measured_point(
    subject: Subject, located: LocateResult, masks: MaskGrid, key: Key, settings: PointSettings, bar: Bar
) -> tuple[SweepPoint, list[str]]:
    """The figures of one setting, and what was warned of meanwhile."""
    mask = masks.mask(located, key)
    texts, bos, max_batch_tokens = settings.texts, settings.bos, settings.max_batch_tokens
    with collected() as said, under(subject, mask):
        drawn = sinks_on(
            subject,
            T=settings.T,
            epsilon=settings.epsilon,
            texts=texts,
            bos=bos,
            criterion=settings.criterion,
            max_batch_tokens=max_batch_tokens,
            progress=bar.part(settings.n_tokens_cut),
        )
    # Each context of a mask says once whether it has a target; only the sequences measured above matter.
    with collected(), under(subject, mask):
        predicted = perplexity_on(
            subject,
            T=settings.T,
            texts=texts,
            bos=bos,
            max_batch_tokens=max_batch_tokens,
            progress=bar.part(settings.n_tokens_cut),
        )
        rigid = rigidity_on(
            subject,
            texts=texts,
            n_first_tokens=2,  # the least: what they say does not depend on the mask
            located=located,
            bos=bos,
            max_batch_tokens=max_batch_tokens,
            progress=bar.part(settings.n_tokens),
        )
    return _point(key, located, predicted, drawn, rigid), said


def _point(
    key: Key, located: LocateResult, predicted: PerplexityResult, drawn: SinksResult, rigid: RigidityResult
) -> SweepPoint:
    assert located.me_layer is not None
    assert rigid.rigid_until is not None
    until_erased = [value for value in rigid.cosine_next[located.me_layer : rigid.rigid_until] if value is not None]
    read, out = rigid.mean_rank("attn_in"), rigid.mean_rank("block_out")
    return SweepPoint(
        selector=key[0],
        rate=key[1],
        perplexity=predicted.perplexity,
        sink_rate=drawn.rate,
        sink_rate_after_me=sink_rate_after(drawn, located.me_layer),
        sink_rate_by_layer=drawn.rate_by_layer,
        alpha=drawn.alpha,
        cosine_next=rigid.cosine_next,
        cosine_peak=rigid.cosine_peak,
        cosine_rigid=float(np.mean(until_erased)) if until_erased else None,
        rank_attn_in=read[0],
        rank_attn_in_without=read[1],
        rank_block_out=out[0],
        rank_block_out_without=out[1],
        perplexity_low=predicted.low,
        perplexity_high=predicted.high,
        nll_by_sequence=predicted.by_sequence,
    )
