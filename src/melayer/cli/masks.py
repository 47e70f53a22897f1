"""A mask from options: checked before a model is loaded, made once there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from melayer.cli.parsing import layers_of
from melayer.cli.session import progress
from melayer.errors import InputError

if TYPE_CHECKING:
    from melayer.interventions.load import Loaded
    from melayer.interventions.mask import WeMask
    from melayer.measurements.locate.result import LocateResult


@dataclass(frozen=True)
class MaskRequest:
    """The mask that the options ask for."""

    rate: float | None
    """None: no mask."""
    selector: str
    strength: float
    seed: int
    positions: str = "first"
    blocks: list[range] | None = None
    """None: all after the ME layer."""

    def fields(self) -> dict[str, Any]:
        """The fields of a WeMask, but for its layers."""
        return {
            "rate": self.rate,
            "selector": self.selector,
            "strength": self.strength,
            "seed": self.seed,
            "positions": self.positions,
        }

    def check(self) -> None:
        """Raises InputError for whatever is wrong before a model is loaded."""
        from melayer.interventions.mask import WeMask

        if self.rate is not None:
            WeMask(**self.fields(), me_layer=0, massive_above=0.0)

    def on(self, located: LocateResult) -> WeMask:
        """The mask after the ME layer that `locate` found."""
        from melayer.interventions.mask import WeMask

        return WeMask.from_located(located, **self.fields())

    def made(self, loaded: Loaded, name: str, measuring: dict[str, Any]) -> WeMask:
        """The mask for this model; the ME layer is located first where it matters.

        Args:
            loaded: The model.
            name: What to call it.
            measuring: The arguments of `locate`.
        """
        from melayer.interventions.mask import WeMask

        layers = layers_of(self.blocks, loaded, measuring["parts"])
        if layers is not None and self.positions == "first":
            return WeMask(**self.fields(), layers=layers)
        mask = self.on(located(loaded, name, measuring))
        return mask if layers is None else replace(mask, layers=layers)


def located(loaded: Loaded, name: str, measuring: dict[str, Any]) -> LocateResult:
    """Where the massive activation emerges, under a bar."""
    from melayer.measurements.locate.locate import locate

    with progress("Locating") as part:
        # Nobody is shown what is found with other first tokens here.
        arguments = {**measuring, "other_first_tokens": False}
        return locate(loaded.model, loaded.tokenizer, **arguments, name=name, progress=part(0))


def require_plain(loaded: Loaded, options: str) -> None:
    """Raises InputError where a mask was saved with the model: the one that `options` ask for cannot be added."""
    if loaded.mask is not None:
        raise InputError(
            f"A mask that was saved with the model is applied already, so none can be added. Leave {options} out, or "
            "give --no-mask."
        )
