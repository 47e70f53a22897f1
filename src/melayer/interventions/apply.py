"""A mask at work on a model: which tokens of the call at hand, and what becomes of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from melayer.errors import InputError, MelayerWarning
from melayer.interventions.at_work import AtWork, Call
from melayer.interventions.positions import Positions, positions
from melayer.model import hooks
from melayer.model.decoder import Decoder

Target = Literal["first", "massive"]


@dataclass(frozen=True, eq=False)
class Masking:
    """What a mask comes to on one model."""

    layers: tuple[int, ...]
    """The masked blocks."""
    keeps: Mapping[int, torch.Tensor]
    """For each layer the factors [d_model], float32 on the host; empty where they are chosen by token."""
    count: int
    """Masked dimensions of a token."""
    largest: bool
    """Whether a token's largest entries are chosen, or its smallest."""
    strength: float
    target: Target
    me_layer: int | None
    massive_above: float | None

    @property
    def dims(self) -> tuple[tuple[int, ...], ...]:
        """For each layer its masked dimensions; none where they are chosen by token."""
        return tuple(tuple(keep.lt(1).nonzero().flatten().tolist()) for keep in self.keeps.values())


@dataclass(eq=False)
class _Masked(Call):
    """The tokens that are masked in one call of the model."""

    shape: tuple[int, int] = (0, 0)
    at: Positions | None = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    """Rows and columns of the masked tokens, where there are any."""
    flags: torch.Tensor | None = None
    """[batch, seq] for massive tokens, of which nobody knows how many there are without asking the device."""


class MaskAtWork(AtWork):
    """The hooks of a mask on a model."""

    def __init__(self, edit: Any, masking: Masking, when: Callable[[], bool] | None = None) -> None:
        """Not at work yet.

        Args:
            edit: The mask.
            masking: What it comes to on the model.
            when: Asked at each call of the model; where it says no, that call runs without the mask.
        """
        super().__init__(edit, when)
        self.masking = masking
        self.placed: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        self.said = False
        self.weights = ""
        """The fingerprint of the weights that it was put on."""
        self._signature: inspect.Signature | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew where it is asked for."""
        return {**super().__getstate__(), "placed": {}, "_signature": None}

    def write_beside(self, directory: Path, model: nn.Module) -> None:
        """Writes the mask as it is at work."""
        self.edit.as_applied(self.masking, model, self.weights).save(directory)

    def registrations(self, decoder: Decoder) -> list[hooks.Registration]:
        """At `attn_in` of each masked block, and at the ME layer's output where massive tokens are known by it."""
        masking, at = self.masking, self.masking.me_layer
        if not masking.count or not masking.strength or not masking.layers:
            return []
        found: list[hooks.Registration] = []
        if at is not None and masking.massive_above is not None:
            found += hooks.seeing([(at, decoder.blocks[at].sites["block_out"])], self._recognise)
        points = [(layer, decoder.blocks[layer].sites["attn_in"]) for layer in masking.layers]
        return found + hooks.editing(points, self._masked)

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call of the model begins: find its first tokens, once for all blocks."""
        if self._signature is None:
            self._signature = inspect.signature(module.forward)  # once, since decoding calls it for every token
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise InputError("The model was called without input_ids and inputs_embeds, so nothing can be masked.")
        # By what it can do: transformers 5.24 renamed the argument from past_key_values to cache, and takes both.
        cache = next((value for value in arguments.values() if hasattr(value, "get_seq_length")), None)
        shape = (tokens.shape[0], tokens.shape[1])
        at = positions(
            shape,
            attention_mask=arguments.get("attention_mask"),
            position_ids=arguments.get("position_ids"),
            past=0 if cache is None else int(cache.get_seq_length()),
            device=tokens.device,
        )
        call = _Masked(self, True, shape=shape, at=at)
        if self.masking.target == "first" and at.first is not None:
            rows, columns = at.first.nonzero(as_tuple=True)
            call.places = (rows, columns) if len(rows) else None
        return call

    def outside(self, layer: int) -> Call | None:
        """Which tokens are first is known from a call of the model alone."""
        raise InputError(
            f"Block {layer} was called outside of a call of the model, so which of its tokens are first is not known. "
            "Call the model, or take the mask off."
        )

    def _recognise(self, layer: int, hidden: torch.Tensor) -> None:
        """At the ME layer's output: which tokens are massive, or whether those that are masked are."""
        running = hooks.at_hand()
        if running is None or running.covered:
            return  # it runs again, and it is known
        call = self.part_of(layer)
        if not isinstance(call, _Masked) or call.at is None:
            return
        above = self.masking.massive_above
        assert above is not None
        largest = hidden.detach().abs().amax(dim=-1).float()
        if self.masking.target == "massive":
            flags = largest > above
            call.flags = flags if call.at.real is None else flags & call.at.real.to(flags.device)
            self._say_none_massive(call, largest)
        elif call.places is not None and not self.said:
            rows, columns = (index.to(hidden.device) for index in call.places)
            self._say_ordinary(largest[rows, columns], above)

    def _say_ordinary(self, largest: torch.Tensor, above: float) -> None:
        """Says once that a masked first token [n] is not massive."""
        ordinary = int((largest <= above).sum())
        if ordinary:
            self._say(
                f"In {ordinary} of {len(largest)} sequences the masked first token is not massive (largest |h| at "
                f"block {self.masking.me_layer}: {float(largest.min()):,.0f}, needed {above:,.0f}). The mask takes "
                "from an ordinary token there, which can cost: compare with the plain model."
            )

    def _say_none_massive(self, call: _Masked, largest: torch.Tensor) -> None:
        """Says once that sequences begin and none has a massive token; one token alone tells nothing."""
        assert call.at is not None
        if self.said or call.at.first is None or call.flags is None or call.shape[1] < 2:
            return
        begins = call.at.first.any(dim=1)
        if bool(begins.all()) and not bool(call.flags.any()):
            self._say(
                f"No token of {len(begins)} sequences is massive (largest |h| at block {self.masking.me_layer}: "
                f"{float(largest.amax()):,.0f}, needed {self.masking.massive_above:,.0f}), so nothing is masked."
            )

    def _say(self, what: str) -> None:
        self.said = True
        warnings.warn(what, MelayerWarning, stacklevel=2)

    def _masked(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """What attention reads in place of x [batch, seq, d_model]; None where nothing is masked."""
        call = self.part_of(layer)
        if not isinstance(call, _Masked) or (call.places is None and call.flags is None):
            return None
        if call.shape != tuple(x.shape[:2]):
            raise InputError(
                f"Block {layer} was called with {tuple(x.shape[:2])} tokens in a call of the model with {call.shape}, "
                "so which of them are first is not known."
            )
        if call.flags is not None:
            flags = call.flags.to(x.device).unsqueeze(-1)
            return torch.where(flags, x * self._factors(layer, x), x)
        assert call.places is not None
        if call.places[0].device != x.device:
            call.places = (call.places[0].to(x.device), call.places[1].to(x.device))
        states = x[call.places]
        return x.index_put(call.places, states * self._factors(layer, states))

    def _factors(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """1 - strength * m for these tokens [..., d_model]: [d_model], or one row for each."""
        if layer in self.masking.keeps:
            key = (layer, x.device, x.dtype)
            if key not in self.placed:
                # Kept for later calls, which may record gradients though this one does not.
                with torch.inference_mode(False):
                    self.placed[key] = self.masking.keeps[layer].to(x.device, x.dtype)
            return self.placed[key]
        chosen = x.detach().abs().topk(self.masking.count, dim=-1, largest=self.masking.largest).indices
        return torch.ones_like(x).scatter(-1, chosen, 1.0 - self.masking.strength)
