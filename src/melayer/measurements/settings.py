"""What results say about how they came to be: the keys that they share, each written in one place.

A result's `settings` are a plain dictionary, made of these and of what is the measurement's own:

    {"criterion": criterion_settings(criterion), **text_settings(rows, texts, max_tokens, bos), "seed": seed}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from melayer.data.rows import Row
from melayer.data.texts import builtin_texts
from melayer.measurements.criterion import STAGE_SHARE, WHOLE_SHARE, Criterion

LAYERS_COUNTED_FROM = 0
"""The number of the first block, wherever one is named."""

Origin = Literal["built-in", "given"]
"""Whether the texts are melayer's own or the caller's."""


class BosSettings(TypedDict):
    """Whether sequences begin with BOS."""

    asked: bool | None
    """None leaves it to the tokenizer."""
    sequences_with_bos: int


class CriterionSettings(TypedDict):
    """The fields of `Criterion`."""

    min_abs: float
    min_ratio: float
    persistence: float
    majority: float
    min_tokens: int


class WindowSettings(TypedDict):
    """Of texts cut into sequences of T tokens; T and their number are fields of the results themselves."""

    texts: Origin
    bos: BosSettings


class TextSettings(WindowSettings):
    """Of texts with a sequence each."""

    n_sequences: int
    n_tokens: int
    max_tokens: int | None
    """As it was asked for; None is the default."""


class LayerSettings(TypedDict):
    """Of a result that names blocks."""

    layers_counted_from: int


class FrugalSettings(TypedDict):
    """How a model was run block by block."""

    blocks_run: int
    stop_early: bool


class LocateSettings(TextSettings, LayerSettings):
    """Of `locate`."""

    stage_share: float
    whole_share: float
    max_listed: int
    """Massive scalars listed of each text and block; all are counted, and all are computed with."""


class FrugalLocateSettings(LocateSettings):
    """Of `locate_frugal`."""

    frugal: FrugalSettings


class ExplainSettings(TextSettings, LayerSettings):
    """Of `explain`."""

    criterion: CriterionSettings
    layers: list[int] | None
    """As they were asked for; None is the ME layer and every stage."""
    sequences: list[int]
    """The texts in which the causes were asked for."""
    seeds: int
    top: int
    max_texts: int
    majority: float
    stage_share: float


class RigiditySettings(TextSettings, LayerSettings):
    """Of `rigidity`."""

    criterion: CriterionSettings
    seed: int
    first_tokens: str
    fixed_first_token: str | None
    """Its text; None where the first tokens were drawn."""


class SinksSettings(WindowSettings, LayerSettings):
    """Of `sinks`."""

    criterion: CriterionSettings


def origin_of(texts: Sequence[str] | None) -> Origin:
    """Whether texts are melayer's own (None, or the first ones of them) or the caller's."""
    own = texts is None or list(texts) == builtin_texts()[: len(texts)]
    return "built-in" if own else "given"


def bos_settings(rows: Sequence[Row], bos: bool | None) -> BosSettings:
    """What was asked for, and how many of the rows begin with BOS."""
    return {"asked": bos, "sequences_with_bos": sum(row.has_bos for row in rows)}


def criterion_settings(criterion: Criterion) -> CriterionSettings:
    """The criterion's fields."""
    return {
        "min_abs": criterion.min_abs,
        "min_ratio": criterion.min_ratio,
        "persistence": criterion.persistence,
        "majority": criterion.majority,
        "min_tokens": criterion.min_tokens,
    }


def window_settings(rows: Sequence[Row], texts: Sequence[str] | None, bos: bool | None) -> WindowSettings:
    """Of rows that `data.rows.windows` made of the texts."""
    return {"texts": origin_of(texts), "bos": bos_settings(rows, bos)}


def text_settings(
    rows: Sequence[Row], texts: Sequence[str] | None, max_tokens: int | None, bos: bool | None
) -> TextSettings:
    """Of rows that `data.rows.encode` made of the texts."""
    return {
        "texts": origin_of(texts),
        "n_sequences": len(rows),
        "n_tokens": sum(map(len, rows)),
        "max_tokens": max_tokens,
        "bos": bos_settings(rows, bos),
    }


def locate_settings(
    rows: Sequence[Row], texts: Sequence[str] | None, max_tokens: int | None, bos: bool | None, max_listed: int
) -> LocateSettings:
    """Of `locate`, with the shares that make a stage and an emergence."""
    return {
        **text_settings(rows, texts, max_tokens, bos),
        "stage_share": STAGE_SHARE,
        "whole_share": WHOLE_SHARE,
        "max_listed": max_listed,
        "layers_counted_from": LAYERS_COUNTED_FROM,
    }
