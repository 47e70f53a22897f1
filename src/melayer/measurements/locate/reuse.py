"""A located result that another measurement goes on from."""

from __future__ import annotations

from collections.abc import Sequence

from melayer.data.rows import Row
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.result import LocateResult
from melayer.model.provenance import ModelInfo, require_same_model


def options_of(
    located: LocateResult | None, *, criterion: Criterion | None, max_tokens: int | None, bos: bool | None
) -> tuple[int | None, bool | None]:
    """`max_tokens` and `bos` of a measurement: where they are not given, those of the located result.

    Raises:
        InputError: The located result has another criterion than the one given.
    """
    if located is None:
        return max_tokens, bos
    if criterion not in (None, located.criterion):
        raise InputError("The located result has another criterion than the one given. Give one of them only.")
    settings = located.settings
    return (
        settings["max_tokens"] if max_tokens is None else max_tokens,
        settings["bos"]["asked"] if bos is None else bos,
    )


def require_located_on(located: LocateResult, model: ModelInfo, rows: Sequence[Row]) -> None:
    """Raises InputError unless the result is of this model and of these rows, as far as it tells."""
    require_same_model(
        located.model.fingerprint,
        model.fingerprint,
        f"The located result is of another model (fingerprint {located.model.fingerprint}, this one's is "
        f"{model.fingerprint}). Run locate on this model, or leave `located` out.",
    )
    theirs = [(row.n_tokens, row.first_token, row.text[:79]) for row in located.sequences]
    if theirs != [(len(row), row.tokens[0], row.text[:79]) for row in rows]:
        raise InputError(
            f"The located result is of other texts ({len(located.sequences)} texts, {located.settings['n_tokens']} "
            f"tokens) than those given ({len(rows)} texts, {sum(map(len, rows))} tokens). Give the same texts, bos "
            "and max_tokens to both, or leave `located` out."
        )
