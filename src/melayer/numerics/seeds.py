"""Seeds that every generator takes."""

from __future__ import annotations

from melayer.errors import InputError

LARGEST = 2**32 - 1
"""numpy's legacy generator, which trainers seed, takes no larger one; torch's takes up to 2^64 - 1."""


def require_seed(seed: object) -> None:
    """Raises InputError unless this is a whole number that every generator takes as a seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST:
        raise InputError(f"seed is {seed!r}; expected a whole number from 0 to {LARGEST}. Give e.g. 0.")
