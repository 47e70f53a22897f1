"""Which treatments there is something for on this model, and the mask that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from melayer.errors import InputError, collected
from melayer.interventions.mask import MadeFor, Selector, WeMask
from melayer.model.decoder import Decoder
from melayer.quantisation.check import Check
from melayer.quantisation.choices import Choices
from melayer.quantisation.massive import Emergence
from melayer.quantisation.treatments import BAKED, MASKED, Treatment


@dataclass(frozen=True)
class MaskOptions:
    """The mask that is made where none is given, see `WeMask`."""

    rate: float
    selector: Selector
    strength: float
    layers: tuple[int, ...] | None
    seed: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What is measured."""

    treatments: tuple[Treatment, ...]
    active_mask: WeMask | None
    """That of the masked treatments; None where there is none of them."""
    notes: tuple[str, ...]
    """Why others are not measured."""

    def mask_of(self, treatment: Treatment) -> WeMask | None:
        """The mask that the treatment has."""
        return self.active_mask if treatment in MASKED else None


def planned(check: Check, choices: Choices, emerged: Emergence, mask: WeMask | None, options: MaskOptions) -> Plan:
    """The treatments of those chosen that can be measured.

    Args:
        check: What is run.
        choices: What is asked for.
        emerged: Whether and where massive tokens emerge.
        mask: The mask that was given; it fits the model.
        options: Of the mask that is made where none is given.

    Raises:
        InputError: A treatment was asked for by name that there is nothing for, or the mask cannot be made.
    """
    plan = _possible(choices, _impossible(emerged, mask, check.sequences.prefix), mask)
    if mask is not None or not any(treatment in MASKED for treatment in plan.treatments):
        return plan
    made = _made(check, emerged, options)
    try:
        require_fit(check.decoder, made)
    except InputError as error:
        if choices.explicit or options.layers is not None:
            raise
        return _without_mask(plan, str(error))
    return replace(plan, active_mask=made)


def require_fit(decoder: Decoder, mask: WeMask) -> None:
    """Raises InputError where the mask does not fit the model; its warnings come when it is at work."""
    with collected(), mask.apply(decoder):
        pass


def _impossible(emerged: Emergence, mask: WeMask | None, prefix: tuple[int, ...]) -> dict[Treatment, str]:
    """Why which treatments have nothing to work on."""
    reasons: dict[Treatment, str] = {}
    if not prefix:
        no_token = "the tokenizer puts no token in front that could be baked; ask for one (--bos or --prefix)"
        reasons |= dict.fromkeys(BAKED, no_token)
    if emerged.me_layer is None and mask is None:
        reasons |= dict.fromkeys(MASKED, "there is no ME layer in these texts, so there is nothing to mask")
    if mask is not None and mask.positions != "first":
        reasons["baked+mask"] = "only a mask on first tokens can be baked"
    return reasons


def _possible(choices: Choices, impossible: Mapping[Treatment, str], mask: WeMask | None) -> Plan:
    left_out = [treatment for treatment in choices.treatments if treatment in impossible]
    if left_out and choices.explicit:
        raise InputError(f"Treatment {left_out[0]!r} cannot be measured: {impossible[left_out[0]]}.")
    possible = tuple(treatment for treatment in choices.treatments if treatment not in impossible)
    notes = tuple(f"Not measured: {treatment}, since {impossible[treatment]}." for treatment in left_out)
    return Plan(possible, mask if any(treatment in MASKED for treatment in possible) else None, notes)


def _without_mask(plan: Plan, why: str) -> Plan:
    notes = [f"Not measured: {treatment}, since {why}" for treatment in plan.treatments if treatment in MASKED]
    unmasked = tuple(treatment for treatment in plan.treatments if treatment not in MASKED)
    return Plan(unmasked, None, (*plan.notes, *notes))


def _made(check: Check, emerged: Emergence, options: MaskOptions) -> WeMask:
    assert emerged.me_layer is not None
    info = check.subject.info
    return WeMask(
        rate=options.rate,
        selector=options.selector,
        strength=options.strength,
        layers=options.layers,
        seed=options.seed,
        me_layer=emerged.me_layer,
        massive_above=emerged.above,
        made_for=MadeFor(info.family, info.n_layers, info.d_model, info.fingerprint),
    )
