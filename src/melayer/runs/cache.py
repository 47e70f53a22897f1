"""Where converted files are kept, and the hash of a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    pass


def cache_directory() -> Path:
    """Where conversions live: $MELAYER_CACHE, or the platform's user cache directory."""
    return Path(os.environ.get("MELAYER_CACHE") or platformdirs.user_cache_path("melayer"))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
