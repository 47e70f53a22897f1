"""What a result says about how it came to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from melayer.data.rows import Row
from melayer.measurements.criterion import STAGE_SHARE, WHOLE_SHARE

if TYPE_CHECKING:
    pass


def settings_of(
    rows: Sequence[Row], texts: Sequence[str] | None, max_tokens: int | None, bos: bool | None
) -> dict[str, Any]:
    """What a result says about how it came to be."""
    return {
        "texts": "built-in" if texts is None else "given",
        "n_sequences": len(rows),
        "n_tokens": sum(map(len, rows)),
        "max_tokens": max_tokens,
        "bos": {"asked": bos, "sequences_with_bos": sum(row.has_bos for row in rows)},
        "stage_share": STAGE_SHARE,
        "whole_share": WHOLE_SHARE,
        "layers_counted_from": 0,
    }
