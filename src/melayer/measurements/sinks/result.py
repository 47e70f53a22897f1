"""What `sinks` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from melayer.measurements.settings import SinksSettings
from melayer.model.provenance import ModelInfo
from melayer.version import __version__


@dataclass(frozen=True)
class SinkHead:
    """A head whose attention the key draws in most sequences."""

    layer: int
    head: int
    alpha: float
    """Mean over the sequences."""
    share: float
    """The share of the sequences in which it is a sink head."""


@dataclass(frozen=True)
class MassiveKeys:
    """What the massive tokens draw, wherever they stand."""

    n_tokens: int
    n_not_first: int
    """Those that are not the first token."""
    alpha: tuple[tuple[float | None, ...], ...]
    """[layer][head] mean over the massive tokens."""
    rate: float
    """The share of (massive token, layer, head) that are sinks."""
    rate_after_me: float | None


@dataclass(frozen=True)
class SinksResult:
    """What `sinks` found. Layers, heads and keys are 0-based."""

    model: ModelInfo
    settings: SinksSettings
    T: int
    epsilon: float
    key: int
    n_sequences: int
    me_layer: int | None
    alpha: tuple[tuple[float | None, ...] | None, ...]
    """[layer][head] mean of alpha_key over the sequences; None for a layer without softmax attention."""
    rate: float
    rate_by_layer: tuple[float | None, ...]
    rate_until_me: float | None
    """Over the blocks up to the ME layer, that one included: its attention reads what is there before."""
    rate_after_me: float | None
    heads: tuple[SinkHead, ...]
    """The heads that are sinks in more than half of the sequences, strongest first."""
    massive: MassiveKeys | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        values = asdict(self)
        return {"melayer_version": __version__, **values, "model": self.model.to_dict(), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        start = (
            f"Over {self.n_sequences} sequences of T = {self.T} tokens, key {self.key} is a sink (alpha > "
            f"{self.epsilon:g}) in {self.rate:.1%} of all heads"
        )
        if self.me_layer is None:
            return f"{start}; there is no ME layer to compare before and after."
        if self.rate_until_me is None or self.rate_after_me is None:
            return f"{start}; the ME layer is block {self.me_layer}."
        return (
            f"{start}: {self.rate_until_me:.1%} up to the ME layer (block {self.me_layer}) and "
            f"{self.rate_after_me:.1%} after it."
        )
