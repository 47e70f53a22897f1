"""The model that an edit was made for."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from melayer.errors import InputError, MelayerWarning
from melayer.interventions.fields import shown, whole
from melayer.measurements.locate.result import LocateResult
from melayer.model.decoder import Decoder
from melayer.model.provenance import fingerprint


@dataclass(frozen=True)
class MadeFor:
    """The model that a mask was made for."""

    family: str
    n_layers: int
    d_model: int
    fingerprint: str

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        if not isinstance(self.family, str) or not 0 < len(self.family) <= 200 or not self.family.isprintable():
            raise InputError(f"made_for.family is {shown(self.family)}; expected a name such as 'llama'.")
        for name in ("n_layers", "d_model"):
            object.__setattr__(self, name, whole(f"made_for.{name}", getattr(self, name)))
        if not isinstance(self.fingerprint, str) or not re.fullmatch(r"[0-9a-f]{16}", self.fingerprint):
            raise InputError(
                f"made_for.fingerprint is {shown(self.fingerprint)}; expected 16 hexadecimal digits, as `locate` "
                "prints them."
            )

    @classmethod
    def of(cls, located: LocateResult) -> MadeFor:
        """The model that `locate` measured."""
        model = located.model
        return cls(model.family, model.n_layers, model.d_model, model.fingerprint)

    def check(self, decoder: Decoder) -> None:
        """Raises InputError for another architecture, and warns of other weights."""
        if (decoder.family, decoder.n_layers, decoder.d_model) != (self.family, self.n_layers, self.d_model):
            raise InputError(
                f"It was made for another model: {self.family} with {self.n_layers} blocks and d_model "
                f"{self.d_model}, and this is {decoder.family} with {decoder.n_layers} and {decoder.d_model}. "
                "Make one for this model from melayer.locate(model, tokenizer)."
            )
        # Adapters rename every parameter, so that the hash of the same base model would differ.
        found = self.fingerprint if hasattr(decoder.model, "peft_config") else fingerprint(decoder.model)
        if found != self.fingerprint:
            warnings.warn(
                f"It was made for weights with fingerprint {self.fingerprint}; these have {found}. Where the ME layer "
                "is may have changed: run locate on them.",
                MelayerWarning,
                stacklevel=5,
            )
