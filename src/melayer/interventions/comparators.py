"""What else can be done about a massive activation, to hold WeMask against: four edits at the ME layer.

Each is a description without state, applied as a mask is, and looks at one token at a time: no token depends on those
beside or behind it, on padding or on the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from melayer.data.rows import batches, encode
from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.interventions import saving
from melayer.interventions.at_work import AtWork, applied, require_unmasked
from melayer.interventions.fields import numbers, real, whole
from melayer.interventions.made_for import MadeFor
from melayer.measurements.explain.explain import explain
from melayer.measurements.locate.result import LocateResult
from melayer.model import hooks
from melayer.model.decoder import Block, Decoder
from melayer.model.forward import forward
from melayer.model.isolated_block import Edit, flat, with_gamma
from melayer.model.provenance import fingerprint, require_same_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _ComparatorAtWork(AtWork):
    """The hooks of a comparator on a model."""

    def __init__(self, edit: _AtOneBlock, edits: Sequence[Edit]) -> None:
        super().__init__(edit)
        self._edits: Sequence[Edit] | None = edits
        self._changes = [change for _, change in edits]

    def __getstate__(self) -> dict[str, Any]:
        """Without the places: the hooks are there already."""
        return {**super().__getstate__(), "_edits": None}

    def registrations(self, decoder: Decoder) -> list[hooks.Registration]:
        """One for each edit, in order."""
        points = [(place, point) for place, (point, _) in enumerate(self._edits or ())]
        self._edits = None
        return hooks.editing(points, self._changed)

    def _changed(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        if self.part_of(self.edit.me_layer) is None:
            return None
        return self._changes[place](x)


@dataclass(frozen=True)
class _AtOneBlock:
    """An edit inside one block."""

    me_layer: int

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        object.__setattr__(self, "me_layer", whole("me_layer", self.me_layer))

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values that JSON can hold."""
        return {"comparator": type(self).__name__, **asdict(self)}

    @contextmanager
    def apply(self, model: PreTrainedModel | Decoder, *, parts: Mapping[str, str] | None = None) -> Iterator[None]:
        """Every forward pass inside the context runs under the edit; no weight is touched, no hook stays.

        Args:
            model: A causal language model from transformers, or its parts, read before.
            parts: Names of parts that `wiring.read` does not find by itself.

        Raises:
            InputError: It does not fit the model, something else is applied already, or the model is compiled.
            ArchitectureError: A part of the model was not found.
        """
        decoder = require_unmasked(model, parts)
        made_for: MadeFor | None = getattr(self, "made_for", None)
        if made_for is not None:
            made_for.check(decoder)
        if not 0 <= self.me_layer < decoder.n_layers:
            raise InputError(f"me_layer is {self.me_layer}, but the model has blocks 0 to {decoder.n_layers - 1}.")
        at_work = _ComparatorAtWork(self, self._edits(decoder, decoder.blocks[self.me_layer]))
        with applied(decoder, at_work):
            saving.bring_along(decoder, at_work)
            try:
                yield
            finally:
                saving.leave_behind(decoder.model, at_work)

    def _edits(self, decoder: Decoder, block: Block) -> list[Edit]:
        raise NotImplementedError


@dataclass(frozen=True)
class SetMassive(_AtOneBlock):
    """The massive scalars at the ME layer's output set to fixed values (Sun et al. 2024, arXiv:2402.17762)."""

    massive_above: float
    """A scalar in one of the dimensions is set where |h| exceeds this."""
    values: tuple[tuple[int, float], ...]
    """For each massive dimension what is put there."""
    made_for: MadeFor | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        super().__post_init__()
        object.__setattr__(self, "massive_above", real("massive_above", self.massive_above, "a size of 0 or more"))
        values = []
        for dim, value in self.values:
            at = whole("A dimension of values", dim)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                raise InputError(f"Dimension {at} was to be set to {value}; expected a finite number.")
            values.append((at, float(value)))
        object.__setattr__(self, "values", tuple(values))

    @classmethod
    def from_located(cls, located: LocateResult, *, to: Literal["zero", "mean"] = "zero") -> SetMassive:
        """Every massive scalar at the ME layer's output, set to zero or to the mean of its dimension over the texts.

        Of the texts that `locate` ran it is every one, however few are listed: the threshold is the lowest of these
        texts. So in a text whose own is higher, scalars between the two are set as well.

        Raises:
            InputError: There is no ME layer, or `to` is neither.
        """
        at = _me_layer(located)
        if to not in ("zero", "mean"):
            raise InputError(f"to is {to!r}; expected zero or mean.")
        values = tuple((row.dim, row.mean if to == "mean" else 0.0) for row in located.massive_dims if row.layer == at)
        above = located.massive_above if located.least_threshold is None else located.least_threshold
        return cls(at, above, values, MadeFor.of(located))

    def _edits(self, decoder: Decoder, block: Block) -> list[Edit]:
        for dim, _ in self.values:
            if not 0 <= dim < decoder.d_model:
                raise InputError(f"Dimension {dim} was given, but the model has 0 to {decoder.d_model - 1}.")
        dims = torch.tensor([dim for dim, _ in self.values], dtype=torch.long)
        values = torch.tensor([value for _, value in self.values])

        return [(block.sites["block_out"], partial(self._set, dims, values))] if self.values else []

    def _set(self, dims: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        there = dims.to(hidden.device)
        scalars = hidden[..., there]
        new = torch.where(scalars.float().abs() > self.massive_above, values.to(scalars), scalars)
        return hidden.index_copy(-1, there, new)


@dataclass(frozen=True)
class FlatGamma(_AtOneBlock):
    """Gamma of the norm before the ME layer's FFN moved towards its mean: half of the paper's cause taken away."""

    amount: float = 1.0
    """0 leaves it, 1 makes all its entries the mean."""
    made_for: MadeFor | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        super().__post_init__()
        object.__setattr__(self, "amount", real("amount", self.amount, "a share between 0 and 1", most=1.0))

    @classmethod
    def from_located(cls, located: LocateResult, *, amount: float = 1.0) -> FlatGamma:
        """At the ME layer that `locate` found.

        Raises:
            InputError: There is no ME layer, or the amount is out of range.
        """
        return cls(_me_layer(located), amount, MadeFor.of(located))

    def _edits(self, decoder: Decoder, block: Block) -> list[Edit]:
        if block.ffn_norm is None:
            raise InputError(f"Block {block.layer} has no norm before its FFN, so there is no gamma to flatten.")
        # Amount 0 changes nothing: no hook is the surest way to leave every bit as it is.
        if not self.amount:
            return []
        edits = with_gamma(block.ffn_norm, flat(self.amount), decoder.d_model)
        # A norm that computes something else is refused here, not in the middle of somebody's forward pass.
        module = block.ffn_norm.module
        probe = torch.linspace(-1.0, 2.0, decoder.d_model)[None, None]
        like = next((p for p in module.parameters() if p.device.type != "meta"), None)
        probe = probe if like is None else probe.to(like)
        with torch.no_grad(), hooks.edit([(change, point) for point, change in edits], lambda fn, x: fn(x)):
            module(probe)
        return edits


@dataclass(frozen=True)
class CapWrite(_AtOneBlock):
    """What the ME layer's FFN adds to a token scaled down to a norm of at most `cap`."""

    cap: float
    """A constant: a median over the tokens at hand would let a token depend on the others."""
    made_for: MadeFor | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        super().__post_init__()
        if isinstance(self.cap, float) and math.isinf(self.cap) and self.cap > 0:
            return  # no cap
        object.__setattr__(self, "cap", real("cap", self.cap, "a norm of 0 or more"))

    @classmethod
    def calibrated(
        cls,
        model: PreTrainedModel | Decoder,
        tokenizer: PreTrainedTokenizerBase,
        located: LocateResult,
        *,
        c: float = 1.0,
        texts: Sequence[str] | None = None,
        parts: Mapping[str, str] | None = None,
    ) -> CapWrite:
        """The cap at c times the median norm of what the FFN adds to tokens that are not massive.

        Args:
            model: The model, or its parts, read before.
            tokenizer: The model's.
            located: What `locate` found on this model, on these texts or on others.
            c: How many medians.
            texts: What to run; by default melayer's own.
            parts: Names of parts that `wiring.read` does not find by itself.

        Raises:
            InputError: There is no ME layer or it is another model's, c is out of range, no token is ordinary, or
                something is applied to the model, so that its write would not be its own.
        """
        at = _me_layer(located)
        if not c >= 0:
            raise InputError(f"c is {c}; expected 0 or more medians.")
        decoder = require_unmasked(model, parts)
        require_same_model(
            located.model.fingerprint,
            fingerprint(decoder.model),
            "The located result is of another model. Give what locate found on this one.",
        )
        block = decoder.blocks[at]
        points = {"write": _site(block, "ffn_out"), "out": block.sites["block_out"]}
        settings = located.settings
        rows = encode(
            tokenizer,
            builtin_texts() if texts is None else texts,
            max_tokens=settings["max_tokens"],
            max_positions=decoder.max_positions,
            bos=settings["bos"]["asked"],
        )
        norms: list[float] = []
        for batch in batches(rows):
            seen: dict[str, torch.Tensor] = {}

            def see(name: str, x: torch.Tensor, into: dict[str, torch.Tensor] = seen) -> None:
                into[name] = x.float().norm(dim=-1).cpu() if name == "write" else x.abs().amax(dim=-1).float().cpu()

            with hooks.watch(points.items(), see):
                forward(decoder.model, batch)
            # Recognised here, not looked up: `locate` lists only some of the scalars, and only of its own texts.
            ordinary = batch.attention_mask.bool() & (seen["out"] <= located.massive_above)
            norms += seen["write"][ordinary].tolist()
        if not norms:
            raise InputError("Every token of these texts is massive, so there is no ordinary one to measure.")
        return cls(at, c * float(np.median(norms)), MadeFor.of(located))

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values that JSON can hold; no cap (infinity) is None."""
        return {**super().to_dict(), "cap": None if math.isinf(self.cap) else self.cap}

    def _edits(self, decoder: Decoder, block: Block) -> list[Edit]:
        point = _site(block, "ffn_out")
        if math.isinf(self.cap):
            return []

        return [(point, partial(self._capped, point.scale))]

    def _capped(self, scale: float, write: torch.Tensor) -> torch.Tensor:
        norm = write.float().norm(dim=-1, keepdim=True) * scale
        # Where the norm is within the cap the factor is 1 exactly, and 0 / 0 never asked for.
        factor = torch.where(norm > self.cap, self.cap / norm, torch.ones_like(norm))
        return torch.where(factor < 1, (write.float() * factor).to(write.dtype), write)


@dataclass(frozen=True)
class RemoveNeurons(_AtOneBlock):
    """Some neurons of the ME layer's FFN write nothing (the super weight's among them: Yu et al. 2024,
    arXiv:2411.07191).
    """

    neurons: tuple[int, ...]
    made_for: MadeFor | None = None

    def __post_init__(self) -> None:
        """Any sequence of neurons will do; each counts once."""
        super().__post_init__()
        object.__setattr__(self, "neurons", tuple(dict.fromkeys(numbers("neurons", self.neurons))))

    @classmethod
    def top(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        located: LocateResult,
        *,
        n: int = 2,
        texts: Sequence[str] | None = None,
        parts: Mapping[str, str] | None = None,
    ) -> RemoveNeurons:
        """The n neurons that write most of the massive value, as `explain` finds them.

        Args:
            model: The model.
            tokenizer: The model's.
            located: What `locate` found on the same texts.
            n: How many.
            texts: What to run; by default melayer's own.
            parts: Names of parts that `wiring.read` does not find by itself.

        Raises:
            InputError: There is no ME layer, n is below 1, or the FFN's neurons are not known.
        """
        at = _me_layer(located)
        why = explain(
            model, tokenizer, texts=texts, located=located, layers=[at], top=n, max_texts=1, seeds=1, parts=parts
        )
        neurons = [neuron for layer in why.layers for neuron in layer.neurons]
        if not neurons or any(neuron.expert is not None for neuron in neurons):
            raise InputError(f"The neurons of block {at} are not known or belong to experts, so none can be removed.")
        return cls(at, tuple(neuron.neuron for neuron in neurons), MadeFor.of(located))

    def _edits(self, decoder: Decoder, block: Block) -> list[Edit]:
        point = _site(block, "ffn_act")
        assert block.ffn is not None
        assert block.ffn.down is not None
        size = block.ffn.down.weight().shape[1]
        for neuron in self.neurons:
            if not 0 <= neuron < size:
                raise InputError(f"Neuron {neuron} was given, but block {block.layer} has 0 to {size - 1}.")
        chosen = torch.tensor(self.neurons, dtype=torch.long)
        return [(point, partial(_zeroed_at, chosen))] if self.neurons else []


def _zeroed_at(places: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    return act.index_fill(-1, places.to(act.device), 0.0)


def _me_layer(located: LocateResult) -> int:
    if located.me_layer is None:
        raise InputError("locate found no ME layer in this model, so there is nothing to take away.")
    return located.me_layer


def _site(block: Block, site: Literal["ffn_act", "ffn_out"]) -> hooks.Point:
    # Where an FFN was not understood, what its last projection reads may be something else than neurons.
    known = site == "ffn_out" or (block.ffn is not None and block.ffn.kind in ("gated", "plain"))
    if site not in block.sites or not known:
        kind = "no FFN" if block.ffn is None else f"an FFN of kind {block.ffn.kind}"
        raise InputError(f"Block {block.layer} has {kind} and so no {site}: this comparator does not work there.")
    return block.sites[site]
