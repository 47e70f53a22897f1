"""What the reader of a check has to know beside its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from melayer.interventions.baked_prefix import BakedPrefix
from melayer.numerics.intervals import FEW
from melayer.quantisation.result import Elsewhere, Prefix
from melayer.quantisation.treatments import Treatment


def remarks(
    me_layer: int | None,
    prefix: Prefix,
    elsewhere: Mapping[str, Elsewhere],
    n_sequences: int,
    baked: Mapping[Treatment, BakedPrefix],
) -> Iterator[str]:
    """Sentences on massive tokens, the number of sequences, and prefixes that cannot be written."""
    if me_layer is None:
        yield "No ME layer was found in the calibration sequences: there is no massive token to bake."
    elif baked and not any(prefix.massive):
        yield "No token of the prefix is massive, so baking it takes no massive token away."
    if baked:
        yield from _not_baked(elsewhere)
    if n_sequences < FEW:
        yield f"With {n_sequences} sequences the intervals are rough."
    for treatment, of in baked.items():
        if why := of.unwritable:
            yield f"The prefix of {treatment} cannot be written: {why}."


def _not_baked(elsewhere: Mapping[str, Elsewhere]) -> Iterator[str]:
    for what, massive in elsewhere.items():
        if not massive.n:
            continue
        one = massive.n == 1
        if what == "calibration":
            then = "is left out of it" if one else "are left out of it"
        else:
            then = "saturates" if one else "saturate"
        yield (
            f"{massive.n} massive token{'' if one else 's'} of the {what} sequences, behind the prefix and so not "
            f"baked, {then} ({massive.n_tokens:,} tokens in all)."
        )
