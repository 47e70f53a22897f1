"""What `locate` found, in words. The limits at which a wording changes stand here and in docs/locate.md."""

from __future__ import annotations

from collections.abc import Sequence

from melayer.data.rows import visible
from melayer.measurements.criterion import STAGE_SHARE
from melayer.measurements.locate.figures import BlockRow, FirstToken, FirstTokens, LocateFigures, Peak, Stage
from melayer.presentation.numbers import share

HALF = 0.5
"""What adds more than this is called most of it."""
MORE = 1.0 + STAGE_SHARE
"""A share from here on is said to be more than the whole, and a peak so many times as large to be another one."""


STARTS = {"as run": "as run", "no bos": "no BOS", "bos": "BOS", "template": "the chat template's"}
"""What can stand first, in words."""


def answer(result: LocateFigures) -> str:
    """The answer, computed from the figures."""
    return _finding(result) + _flips(result.first_tokens)


def _flips(found: FirstTokens | None) -> str:
    """That the finding is another one with another first token, as a sentence; nothing where it is not."""
    if found is None or not found.differing:
        return ""
    texts = "one text" if found.n_sequences == 1 else f"{found.n_sequences} texts"
    others = " and ".join(f"{_with(found, row)} with {_named(row)} first" for row in found.differing)
    as_run = _with(found, found.rows[0])
    return f" It hangs on the first token: in {texts} of up to {found.max_tokens} tokens {as_run} as run, but {others}."


def _with(found: FirstTokens, row: FirstToken) -> str:
    where = "there is no ME layer" if row.me_layer is None else f"the ME layer is block {row.me_layer}"
    same = {of.me_layer for of in (found.rows[0], *found.differing)}
    if len(same) > 1:
        return where
    return f"the first token is {'' if found.first_is_massive(row) else 'not '}massive"


def _named(row: FirstToken) -> str:
    kinds = " and ".join(STARTS[kind] for kind in row.kinds)
    return f"{kinds} (the texts' own token)" if row.token is None else f"“{visible(row.token)}” ({kinds})"


def _finding(result: LocateFigures) -> str:
    """What was found in the texts as they were run."""
    if result.non_finite is not None:
        bad = result.non_finite
        where = "the embedding" if bad.layer is None else f"the output of block {bad.layer}"
        return (
            f"Non-finite activations in {result.model.dtype}: the first ({bad.value}) is in {where}, text "
            f"{bad.sequence}, token {bad.token_index}, dimension {bad.dim}; nothing that depends on it was judged."
        )
    if result.me_layer is None:
        return _without(result)
    row, peak = result.blocks[result.me_layer], result.peak
    at = f"block {result.me_layer} of {result.model.n_layers} (0-based)"
    there = _at(row)
    if peak is None:
        return f"The ME layer is {at}: there {there}; its growth could not be followed{_end(result)}."
    if peak.me_share >= STAGE_SHARE:
        only = _only_first(peak, result.me_layer) if _is_spread(peak, result.me_layer) else ""
        later = f"; the peak is {_peak(row, peak)}" if has_later_peak(result) else ""
        return f"The ME layer is {at}: there {there}; {growth(result)}{later}{_end(result)}{only}."
    return (
        f"The criterion holds from {at} on: there {there}. By definition that is the ME layer, but block "
        f"{result.me_layer} {_adds(peak.me_share)}, which is {_peak(row, peak)}; {growth(result)}"
        f"{_end(result)}. {_verdict(peak)}"
    )


def _without(result: LocateFigures) -> str:
    """That there is no ME layer, and how near it comes."""
    strongest = max(result.blocks, key=lambda row: row.ratio or 0.0)
    if result.n_massive:
        return (
            f"There is no ME layer: the criterion holds in places (most strongly after block {strongest.layer}), "
            "but nowhere in enough sequences for long enough."
        )
    return (
        "No massive activation was found: the largest ratio to the median is "
        f"{strongest.ratio or 0:,.0f} (block {strongest.layer}, |h| = {strongest.max_abs or 0:,.1f}), "
        f"the criterion asks for {result.criterion.min_ratio:,.0f} and |h| > {result.criterion.min_abs:,.0f}."
    )


def growth(result: LocateFigures) -> str:
    """How what stands at the peak came there, as a clause; "it" is the massive activation."""
    peak = result.peak
    if peak is None:
        return "its growth could not be followed"
    stages = sorted((stage for stage in peak.shares if stage.share >= STAGE_SHARE), key=lambda stage: -stage.share)
    most = max(peak.shares, key=lambda stage: stage.share)
    if peak.emergence == "single":
        how = _single(most, result.me_layer)
    elif peak.emergence == "staged":
        parts = [f"block {stage.layer}: {share(stage.share)}" for stage in sorted(stages, key=lambda s: s.layer)]
        how = f"it is created in stages ({', '.join(parts)})"
    elif most.share >= HALF:
        rest = f"{len(stages) - 1} more add at least 10% each" if len(stages) > 1 else "no other adds 10%"
        how = f"most of it comes from {_this(most.layer, result.me_layer)} ({share(most.share)}), {rest}"
    elif len(stages) > 1:
        how = (
            f"it grows gradually: {len(stages)} blocks add at least 10% each, block {most.layer} most "
            f"({share(most.share)})"
        )
    else:
        how = f"it grows gradually: block {most.layer} adds most ({share(most.share)})"
    if peak.embedding_share >= STAGE_SHARE:
        how += f"; {share(peak.embedding_share)} of it stands in the embedding already"
    return how


def kind(result: LocateFigures) -> str:
    """The emergence in a few words, for a title."""
    most = max(result.shares, key=lambda stage: stage.share, default=None)
    if result.emergence == "gradual" and most is not None and most.share >= HALF:
        return f"gradual, but mostly block {most.layer}"
    return result.emergence


def _single(most: Stage, me_layer: int | None) -> str:
    who = "this one block" if most.layer == me_layer else f"block {most.layer} alone"
    if most.share < MORE:
        return f"{who} creates it" + ("" if most.layer == me_layer else f" ({share(most.share)})")
    return f"{who} creates it and more ({share(most.share)} of what is left at the peak)"


def _this(layer: int, me_layer: int | None) -> str:
    return "this one block" if layer == me_layer else f"block {layer}"


def _verdict(peak: Peak) -> str:
    """Where it emerges, if not at the ME layer, as a sentence."""
    stages = [stage for stage in peak.shares if stage.share >= STAGE_SHARE]
    most = max(peak.shares, key=lambda stage: stage.share)
    if peak.emergence == "single" or (peak.emergence == "gradual" and most.share >= HALF):
        mostly = "mostly " if peak.emergence == "gradual" else ""
        return f"It emerges {mostly}at block {most.layer}, not at the ME layer."
    if peak.emergence == "staged":
        return f"It emerges at {_blocks([stage.layer for stage in stages])}, not at the ME layer."
    if peak.embedding_share >= HALF:
        return "It comes with the embedding, so there is no one layer at which it emerges."
    return "So there is no one layer at which it emerges."


def _is_spread(peak: Peak, me_layer: int) -> bool:
    """Whether the ME layer is a stage, but neither the one that adds most of it nor one of two or three."""
    most = max(peak.shares, key=lambda stage: stage.share)
    if peak.emergence == "single":
        return most.layer != me_layer
    return peak.emergence == "gradual" and not (most.layer == me_layer and most.share >= HALF)


def _only_first(peak: Peak, me_layer: int) -> str:
    spread = peak.emergence == "gradual" and all(stage.share < HALF for stage in peak.shares)
    who = "no one layer creates it, and " if spread else ""
    return f"; {who}block {me_layer} is only the first after which the criterion goes on holding"


def _at(row: BlockRow) -> str:
    # A stream of mostly zeros has a median of 0, and no ratio to it.
    ratio = "the median is 0" if row.ratio is None else f"{row.ratio:,.0f} times the median"
    return (
        f"token {row.token_index} (“{visible(row.token)}”) reaches |h| = {row.max_abs or 0:,.0f} in dimension "
        f"{row.dim}, {ratio}"
    )


def _peak(row: BlockRow, peak: Peak) -> str:
    dim = f"in dimension {peak.dim}" if peak.moves_dim else f"in dimension {peak.dim} too"
    token = f" of another token, {peak.token_index} (“{visible(peak.token)}”)," if peak.moves_token else ""
    dim = f"in another dimension, {peak.dim}," if peak.moves_dim and not token else dim
    times = peak.max_abs / row.max_abs if row.max_abs else 0.0
    larger = f", {times:,.1f} times as large" if times >= MORE else ""
    return f"{peak.max_abs:,.0f} {dim}{token} at block {peak.layer}{larger}"


def has_later_peak(result: LocateFigures) -> bool:
    """Whether the peak is another one than what stands at the ME layer: it is larger, or somewhere else."""
    if result.peak is None or result.me_layer is None or result.peak.layer == result.me_layer:
        return False
    larger = result.peak.max_abs >= MORE * (result.blocks[result.me_layer].max_abs or 0.0)
    return larger or result.peak.moves_dim or result.peak.moves_token


def _adds(value: float) -> str:
    """What a block does to the peak."""
    written = share(value)
    return f"writes against the peak ({written} of it)" if written.startswith("-") else f"adds {written} of the peak"


def _end(result: LocateFigures) -> str:
    """Where it is taken away, before the peak and after it."""
    if not result.complete:
        return f"; nothing behind block {result.blocks[-1].layer} was run"
    top = -1 if result.peak_layer is None else result.peak_layer
    before, after = ([at for at in result.erased_at if (at < top) == early] for early in (True, False))
    taken = share(-sum(result.shares[at].share for at in before))
    said = f"; before the peak {_blocks(before)} take{'s' if len(before) == 1 else ''} {taken} away" if before else ""
    return said + (f", and it is erased at {_blocks(after)}" if after else "")


def _blocks(layers: Sequence[int]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
