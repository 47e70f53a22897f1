"""What a mask does as it grows: perplexity, sinks, rigidity and effective rank for each selector and rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from melayer.data.rows import Row
from melayer.data.texts import builtin_texts
from melayer.errors import InputError, require_known
from melayer.interventions.mask import Selector
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate_on
from melayer.measurements.settings import LAYERS_COUNTED_FROM, bos_settings, criterion_settings, origin_of
from melayer.model.subject import Subject
from melayer.runs.progress import Bar, Progress
from melayer.runs.resume_log import Entries, ResumeLog
from melayer.studies.sweep.point import Key, MaskGrid, PointSettings, measured_point
from melayer.studies.sweep.result import SweepPoint, SweepResult, interval_notes
from melayer.studies.sweep.settings import SharedSettings
from melayer.studies.texts import texts_sha256
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATES = tuple(place / 10 for place in range(11))
SELECTORS: tuple[Selector, ...] = ("weight", "activation", "random")
FILE = "sweep.jsonl"
"""Where the command keeps the finished settings, in the directory of the report."""
ENTRIES = Entries("sweep", "point", SweepPoint, lambda point: (point.selector, point.rate))
"""How finished settings are kept."""


def sweep(  # noqa: PLR0913 - the options of the command, each by its name
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
        parts: Names of parts that `wiring.read` does not find by itself.
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
    keys = [(None, 0.0), *check_grid(rates, selectors)]
    if not 0 <= epsilon <= 1:
        raise InputError(f"epsilon is {epsilon}; expected a share of attention between 0 and 1.")
    run_texts = builtin_texts() if texts is None else texts
    subject = Subject.of(model, tokenizer, parts=parts, name=name)
    n_tokens = sum(map(len, subject.rows(run_texts, bos=bos)))
    rows = subject.windows(run_texts, T, bos=bos)
    masks = MaskGrid(strength, None if layers is None else tuple(layers), seed)
    # Whatever is wrong with a mask is wrong before anything has run, too.
    for selector in selectors:
        masks.require_fit(subject, selector, max(rates))
    criterion = criterion or Criterion()
    shared = _shared(masks, criterion, rows, texts, bos)
    log = ResumeLog.opened(ENTRIES, resume, _depends_on(subject, shared, T, epsilon))
    todo = [key for key in keys if key not in log.items]
    bar = Bar(progress, n_tokens + len(todo) * (n_tokens + 2 * T * len(rows)))
    located = locate_on(
        subject,
        texts=run_texts,
        bos=bos,
        criterion=criterion,
        max_batch_tokens=max_batch_tokens,
        progress=bar.part(n_tokens),
    )
    if located.me_layer is None:
        raise InputError("locate found no ME layer in this model with these texts, so there is nothing to sweep.")
    settings = PointSettings(run_texts, bos, criterion, T, epsilon, max_batch_tokens, n_tokens, T * len(rows))
    for key in todo:
        log.add(*measured_point(subject, located, masks, key, settings, bar))
    points = [log.items[key] for key in keys]
    return SweepResult(
        model=located.model,
        settings={
            "rates": sorted({float(rate) for rate in rates}),
            "selectors": list(dict.fromkeys(selectors)),
            **shared,
        },
        me_layer=located.me_layer,
        T=T,
        epsilon=epsilon,
        n_sequences=len(rows),
        plain=points[0],
        masked=tuple(points[1:]),
        notes=tuple(dict.fromkeys([*located.notes, *log.notes_of(keys), *interval_notes(len(rows))])),
        located=located,
    )


def check_grid(rates: Sequence[float], selectors: Sequence[str]) -> list[Key]:
    """The masks of a grid as (selector, rate); rate 0 is no mask.

    Raises:
        InputError: There is no rate or no selector, or one of them is none.
    """
    for what, values in (("rates", rates), ("selectors", selectors)):
        if not values:
            raise InputError(f"There are no {what} to sweep over. Give at least one.")
    for rate in rates:
        if not 0 <= rate <= 1:
            raise InputError(f"rate is {rate}; expected a share between 0 and 1.")
    known = [selector for selector in get_args(Selector) if selector != "dims"]
    for selector in selectors:
        require_known(selector, known, f"selector is {selector!r}")
    shares = sorted({float(rate) for rate in rates if rate > 0})
    return [(selector, rate) for selector in dict.fromkeys(selectors) for rate in shares]


def _shared(
    masks: MaskGrid, criterion: Criterion, rows: Sequence[Row], texts: Sequence[str] | None, bos: bool | None
) -> SharedSettings:
    return {
        "strength": masks.strength,
        "layers": None if masks.layers is None else sorted({int(layer) for layer in masks.layers}),
        "seed": masks.seed,
        "criterion": criterion_settings(criterion),
        "texts": origin_of(texts),
        "texts_sha256": texts_sha256(builtin_texts() if texts is None else texts),
        "bos": bos_settings(rows, bos),
        "layers_counted_from": LAYERS_COUNTED_FROM,
    }


def _depends_on(subject: Subject, shared: SharedSettings, T: int, epsilon: float) -> dict[str, Any]:
    """What the figures of a setting depend on. The grid is left out: it may grow from one run to the next."""
    return {
        **shared,
        "T": T,
        "epsilon": epsilon,
        "fingerprint": subject.info.fingerprint,
        "melayer_version": __version__,
        "dtype": str(subject.model.dtype),
    }
