"""What `locate` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from melayer.measurements.locate.figures import LocateFigures
from melayer.measurements.locate.words import answer
from melayer.measurements.settings import criterion_settings
from melayer.version import __version__


@dataclass(frozen=True)
class LocateResult(LocateFigures):
    """What `locate` found. Layers are 0-based throughout."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "model": self.model.to_dict(),
            "settings": {"criterion": criterion_settings(self.criterion), **self.settings},
            "sentence": self.sentence,
            "me_layer": self.me_layer,
            "emergence": self.emergence,
            "stages": [asdict(stage) for stage in self.stages],
            "erased_at": list(self.erased_at) if self.complete else None,
            "peak_layer": self.peak_layer,
            "shares": [asdict(stage) for stage in self.shares],
            "embedding_share": self.embedding_share,
            "blocks": [asdict(row) for row in self.blocks],
            "embedding_max_abs": self.embedding_max_abs,
            "n_massive": self.n_massive,
            "n_massive_listed": len(self.massive),
            "massive": [asdict(scalar) for scalar in self.massive],
            "massive_dims": [asdict(row) for row in self.massive_dims],
            "peak": None if self.peak is None else self.peak.to_dict(),
            "first_tokens": None if self.first_tokens is None else self.first_tokens.to_dict(),
            "sequences": [{**asdict(row), "massive_tokens": list(row.massive_tokens)} for row in self.sequences],
            "non_finite": asdict(self.non_finite) if self.non_finite else None,
            "notes": list(self.notes),
        }

    @property
    def sentence(self) -> str:
        """The answer, computed from the figures."""
        return answer(self)
