"""Edits at work on a model: which tokens of the call at hand, what becomes of them, and nothing left behind."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from melayer.errors import InputError, MelayerWarning
from melayer.interventions.positions import Positions, positions
from melayer.model import hooks, wiring
from melayer.model.decoder import Block, Decoder, plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Target = Literal["first", "massive"]


@dataclass(frozen=True, eq=False)
class Masking:
    """What a mask comes to on one model."""

    blocks: Mapping[int, Block]
    """The masked blocks by layer."""
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


# The first blocks of models that something is applied to: two edits at once would each see the other's result.
_edited: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def require_unmasked(model: PreTrainedModel | Decoder, parts: Mapping[str, str] | None = None) -> Decoder:
    """The model's parts, if nothing is applied to it and it is not compiled.

    Args:
        model: The model, or its parts where they were read before.
        parts: Names of parts that `wiring.read` does not find by itself.

    Raises:
        InputError: It is compiled, or a mask or a comparator is applied to it.
        ArchitectureError: A part of the model was not found.
    """
    modules = plain_model(model).modules()
    if any("_compiled_call" in vars(m) or "_orig_mod" in m._modules or m._compiled_call_impl for m in modules):
        raise InputError(
            "The model is compiled, and compiled code does not see hooks. Apply the mask to the uncompiled model, or "
            "bake a prefix with mask.bake(model, ids) and compile the plain model."
        )
    decoder = wiring.read(model, parts=parts)
    if decoder.blocks[0].module in _edited:
        raise InputError(
            "A mask or a comparator is applied to this model already. Leave its context first, or take a loaded mask "
            "off with WeMask.detach(model)."
        )
    return decoder


@contextmanager
def exclusive(decoder: Decoder) -> Iterator[None]:
    """Nothing else is applied to the model inside the context, and `generate` does not compile it."""
    config = getattr(decoder.model, "generation_config", None)
    compiles = getattr(config, "disable_compile", None)
    _edited.add(decoder.blocks[0].module)
    try:
        if config is not None:
            config.disable_compile = True
        yield
    finally:
        if config is not None:
            config.disable_compile = compiles
        _edited.discard(decoder.blocks[0].module)


class _Attached:
    """What keeps an edit at work for as long as the model lives. A copy of the model has none of its own."""

    def __init__(self, stack: ExitStack | None = None) -> None:
        self.stack = stack

    def __reduce__(self) -> tuple[type[_Attached], tuple[()]]:
        return _Attached, ()


_ATTACHED = "_melayer_attached"


def attach(model: nn.Module, edit: AbstractContextManager[None]) -> None:
    """Enters the context for good."""
    stack = ExitStack()
    stack.enter_context(edit)
    vars(model)[_ATTACHED] = _Attached(stack)


def detach(model: nn.Module) -> bool:
    """Leaves the context that `attach` entered; false where there is none."""
    attached = vars(model).pop(_ATTACHED, None)
    if attached is None or attached.stack is None:
        return False
    attached.stack.close()
    return True


@dataclass(eq=False)
class _Call:
    """The tokens that are masked in one call of the model."""

    shape: tuple[int, int]
    at: Positions
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    """Rows and columns of the masked tokens, where there are any."""
    flags: torch.Tensor | None = None
    """[batch, seq] for massive tokens, of which nobody knows how many there are without asking the device."""


@dataclass(eq=False)
class MaskHooks:
    """The hooks of a mask on a model, with what they know about the call at hand."""

    masking: Masking
    decoder: Decoder
    when: Callable[[], bool] | None = None
    """Asked at each call of the model; where it says no, that call runs without the mask."""
    signature: inspect.Signature = field(init=False)
    """Of what runs the blocks: read once, since decoding calls it for every token."""
    call: _Call | None = None
    placed: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = field(default_factory=dict)
    said: bool = False

    def __post_init__(self) -> None:
        """Reads what never changes during the edit."""
        self.signature = inspect.signature(self.decoder.stack.forward)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks, inside the context."""
        at = self.masking.me_layer
        with ExitStack() as stack:
            stack.enter_context(
                hooks.record_arguments([(0, self.decoder.stack)], lambda _, args, kw: self._begin(args, kw))
            )
            if at is not None and self.masking.massive_above is not None:
                watched = [(at, self.decoder.blocks[at].sites["block_out"])]
                stack.enter_context(hooks.watch(watched, lambda _, hidden: self._recognise(hidden)))
            points = [(layer, block.sites["attn_in"]) for layer, block in self.masking.blocks.items()]
            stack.enter_context(hooks.edit(points, self._masked))
            stack.enter_context(replay_on_recompute(self))
            yield

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model begins: find its first tokens, once for all blocks."""
        if self.when is not None and not self.when():
            self.call = None
            return
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise InputError("The model was called without input_ids and inputs_embeds, so nothing can be masked.")
        # By what it can do: transformers 5.24 renamed the argument from past_key_values to cache, and takes both.
        cache = next((value for value in arguments.values() if hasattr(value, "get_seq_length")), None)
        at = positions(
            (tokens.shape[0], tokens.shape[1]),
            attention_mask=arguments.get("attention_mask"),
            position_ids=arguments.get("position_ids"),
            past=0 if cache is None else int(cache.get_seq_length()),
            device=tokens.device,
        )
        self.call = _Call((tokens.shape[0], tokens.shape[1]), at)
        if self.masking.target == "first" and at.first is not None:
            rows, columns = at.first.nonzero(as_tuple=True)
            self.call.places = (rows, columns) if len(rows) else None

    def _recognise(self, hidden: torch.Tensor) -> None:
        """At the ME layer's output: which tokens are massive, or whether those that are masked are."""
        call, above = self.call, self.masking.massive_above
        assert above is not None
        if call is None:
            return
        if self.masking.target == "massive":
            flags = hidden.detach().abs().amax(dim=-1).float() > above
            call.flags = flags if call.at.real is None else flags & call.at.real.to(flags.device)
        elif not self.said and call.places is not None:
            self.said = True
            rows, columns = (index.to(hidden.device) for index in call.places)
            largest = hidden.detach()[rows, columns].abs().amax(dim=-1).float()
            ordinary = int((largest <= above).sum())
            if ordinary:
                warnings.warn(
                    f"In {ordinary} of {len(largest)} sequences the masked first token is not massive (largest |h| "
                    f"at block {self.masking.me_layer}: {float(largest.min()):,.0f}, needed {above:,.0f}), so the mask "
                    "has no target there.",
                    MelayerWarning,
                    stacklevel=2,
                )

    def _masked(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """What attention reads in place of x [batch, seq, d_model]; None where nothing is masked."""
        call = self.call
        if call is None or (call.places is None and call.flags is None):
            return None
        if call.shape != tuple(x.shape[:2]):
            raise InputError(
                f"Block {layer} was called with {tuple(x.shape[:2])} tokens outside of a call of the model, so which "
                "of them are first is not known."
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
                self.placed[key] = self.masking.keeps[layer].to(x.device, x.dtype)
            return self.placed[key]
        chosen = x.detach().abs().topk(self.masking.count, dim=-1, largest=self.masking.largest).indices
        return torch.ones_like(x).scatter(-1, chosen, 1.0 - self.masking.strength)


@contextmanager
def replay_on_recompute(hooked: MaskHooks) -> Iterator[None]:
    """Under gradient checkpointing a block runs again in the backward pass: then with the call that it was part of."""
    blocks = [block.module for block in hooked.decoder.blocks]
    originals: dict[nn.Module, Callable[..., Any]] = {}

    def checkpoint(original: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = hooked.call

        def again(*inner: Any) -> Any:
            now, hooked.call = hooked.call, call
            try:
                return run(*inner)
            finally:
                hooked.call = now

        return original(again, *args, **kwargs)

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not hooked.decoder.stack.training:
            return  # nothing runs again
        # At each call, since checkpointing may have been turned on inside the context.
        for block in blocks:
            original = vars(block).get("_gradient_checkpointing_func")
            if original is not None and getattr(original, "func", None) is not checkpoint:
                originals[block] = original
                vars(block)["_gradient_checkpointing_func"] = partial(checkpoint, original)

    try:
        with hooks.record_arguments([(0, hooked.decoder.stack)], lambda _, args, kwargs: before(args, kwargs)):
            yield
    finally:
        for block, original in originals.items():
            # Somebody may have turned it off, or on with other options, in the meantime.
            if getattr(vars(block).get("_gradient_checkpointing_func"), "func", None) is checkpoint:
                vars(block)["_gradient_checkpointing_func"] = original
