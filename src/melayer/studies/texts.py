"""Which texts a study ran: figures are compared over the same ones only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence


def texts_sha256(texts: Sequence[str]) -> str:
    """What tells these texts from others."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
