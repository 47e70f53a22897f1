"""An edit at work on a model: once at most, with every copy of the model, through every backward pass, gone afterwards.

What is at work stands on the model itself, not in a list of ours: its hooks and a mark on each module that they are
on. So whoever holds one of these modules, in whatever wrapper, finds it; and a model that is copied or pickled takes
it along. A hook holds no module, so that a block that is copied alone does not take the whole model with it.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from melayer.errors import InputError, MelayerWarning
from melayer.model import hooks, wiring
from melayer.model.decoder import Decoder, plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "_melayer_edit"
"""The attribute of a module that an edit is at work on."""
_CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute in which transformers keeps what a module's gradients are checkpointed with."""
_lock = threading.Lock()
# By graph task: the calls whose gradients are under way, of those that run under checkpoints that are not ours to see.
_in_backward: dict[int, weakref.WeakSet[Call]] = {}


@dataclass(eq=False)
class Call:
    """One call of what runs the blocks, under an edit."""

    of: AtWork
    acts: bool
    """Whether the edit acts in this call."""
    before: Running | None = None
    """What was at hand when it began."""
    learns: bool = False
    """Whether gradients were recorded when it began."""
    reached: bool = False
    """Whether a block came to where the edit acts."""
    foreign: bool = False
    """Whether it, or a block in it, runs under a checkpoint that is not transformers' own."""


@dataclass(frozen=True, eq=False)
class Running:
    """A call, while it runs or a part of it runs again."""

    call: Call
    covered: bool = False
    """Whether it is known how what runs is run again for its gradients."""


class AtWork:
    """What an edit is while it is at work on a model."""

    def __init__(self, edit: Any, when: Callable[[], bool] | None = None) -> None:
        """Not at work yet.

        Args:
            edit: Its description.
            when: Asked at each call of the model; where it says no, that call runs without the edit.
        """
        self.edit: Any = edit
        self.when = when
        self.on = False
        self.lasts = True
        """Whether it stays until it is taken off, and not only for the time of a context."""
        self.disable_compile: Any = None
        """What the generation config said before."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: no context will end what is at work there."""
        return {**vars(self), "lasts": True}

    # --- what kinds of edits say ------------------------------------------------------------------------------------

    def registrations(self, decoder: Decoder) -> list[hooks.Registration]:
        """The hooks of the edit, but for those around the calls; none where it changes nothing."""
        raise NotImplementedError

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call that begins, and in which the edit acts."""
        return Call(self, True)

    def outside(self, layer: int) -> Call | None:
        """What a block is part of that is called by itself, outside of any call of the model."""
        return Call(self, True)

    def write_beside(self, directory: Path, model: nn.Module) -> None:
        """Writes the edit beside weights of the model that have just been saved, or says that it is not there."""
        warnings.warn(
            f"{type(self.edit).__name__} is at work on this model, and is not in what was saved in {directory}: the "
            "weights there are the plain model's.",
            MelayerWarning,
            stacklevel=4,
        )

    # --- calls ------------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of what runs the blocks begins."""
        before: Running | None = hooks.at_hand()
        if before is not None and before.call.of is self:
            before = None  # left behind by a call that was interrupted
        call = self.called(module, args, kwargs) if self._acts(module) else Call(self, False)
        call.before, call.learns = before, torch.is_grad_enabled()
        if not hooks.in_backward():
            self._guard(call, hooks.checkpoint_around())
        hooks.begin_call(Running(call))
        if module.training:
            self._cover(module)

    def _guard(self, call: Call, around: object) -> None:
        """A call that runs under a checkpoint as a whole is not to run again when the edit is gone."""
        if around is None:
            return
        if not isinstance(around, FunctionCtx):
            raise InputError(
                "The model runs as a whole under torch.utils.checkpoint, which would run it again after "
                f"{type(self.edit).__name__} is taken off. Use model.gradient_checkpointing_enable(), which "
                "checkpoints the blocks."
            )
        call.foreign = True
        hooks.before_gradients(around, partial(_gradients_begin, call))

    def _acts(self, module: nn.Module) -> bool:
        if hooks.paused(module):
            return False  # a probe of ours
        if hooks.in_backward():
            # The whole call runs again. One that was not under the edit is not to be under it now.
            return bool(self._under_way())
        return self.when is None or bool(self.when())

    def end(self, output: Any) -> None:
        """It ends, by an exception where there is no output."""
        running: Running | None = hooks.at_hand()
        if running is None or running.call.of is not self:
            return
        hooks.begin_call(running.call.before)
        if output is not None and running.call.acts and not running.call.reached and "torch._dynamo" in sys.modules:
            raise InputError(
                f"{type(self.edit).__name__} did not act in this call: the blocks run as compiled code, which does not "
                "see hooks. Call the model outside of compiled code, or bake a prefix with mask.bake(model, ids) and "
                "compile the plain model."
            )
        if running.call.foreign:
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    hooks.before_gradients(tensor.grad_fn, partial(_gradients_begin, running.call))

    def part_of(self, layer: int) -> Call | None:
        """The call that a block runs in, if the edit acts in it.

        Raises:
            InputError: It cannot be known.
        """
        running: Running | None = hooks.at_hand()
        if running is None:
            return self._found_again(layer)
        call = running.call
        if call.of is not self or not call.acts:
            return None
        call.reached = True
        if call.learns and not call.foreign and not running.covered and hooks.checkpoint_around() is not None:
            call.foreign = True
        return call

    def _found_again(self, layer: int) -> Call | None:
        if not hooks.in_backward():
            return self.outside(layer)
        calls = self._under_way()
        if len(calls) > 1:
            raise InputError(
                f"Block {layer} runs again for its gradients under a checkpoint that is not transformers' own, and "
                "which of several calls it is part of is not known. Use model.gradient_checkpointing_enable(), or a "
                "backward pass for each call."
            )
        return calls[0] if calls and calls[0].acts else None

    def _under_way(self) -> list[Call]:
        """The calls under this edit whose gradients are under way, where they run under foreign checkpoints."""
        task = torch._C._current_graph_task_id()
        # A checkpoint within a checkpoint has a task of its own.
        tasks = [task] if task in _in_backward else list(_in_backward)
        return [call for key in tasks for call in list(_in_backward.get(key, ())) if call.of is self]

    # --- gradient checkpointing -------------------------------------------------------------------------------------

    def _cover(self, stack: nn.Module) -> None:
        """At each call, since checkpointing may have been turned on, or on in another way, in the meantime."""
        for module in stack.modules():
            original = vars(module).get(_CHECKPOINT)
            if original is not None and not (isinstance(original, _Replaying) and original.of is self):
                vars(module)[_CHECKPOINT] = _Replaying(self, original, hooks.edits_of(module, self))


class _Replaying:
    """A checkpointing function under which what runs again does so in the call that it was part of.

    Also when the edit is no longer at work by then: it is brought back for the module that runs.
    """

    def __init__(self, of: AtWork, original: Callable[..., Any], edits: list[hooks.Registration]) -> None:
        self.of, self.original, self.edits = of, original, edits
        self.brought: list[Any] = []
        self.users = 0

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running: Running | None = hooks.at_hand()
        if running is None or running.call.of is not self.of:
            return self.original(run, *args, **kwargs)
        return self.original(partial(self._again, Running(running.call, covered=True), run), *args, **kwargs)

    def _again(self, running: Running, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with hooks.within(running), self._brought_back():
            return run(*args, **kwargs)

    @contextmanager
    def _brought_back(self) -> Iterator[None]:
        """The hooks are there: those of the edit while it is at work, else ones for us, once for all threads."""
        with _lock:
            mine = not self.of.on
            if mine:
                self.users += 1
                if self.users == 1:
                    self.brought = hooks.put(self.edits, owner=self)
        try:
            yield
        finally:
            if mine:
                with _lock:
                    self.users -= 1
                    if self.users == 0:
                        for handle in self.brought:
                            handle.remove()


def _gradients_begin(call: Call, *_: Any) -> None:
    """A backward pass has come to a call with blocks that run again under a checkpoint that is not transformers'."""
    if not call.of.on and call.acts:
        raise InputError(
            f"The backward pass of a call under {type(call.of.edit).__name__} came after it was taken off the model, "
            "and its blocks are run again under a checkpoint that is not transformers' own, so they would run without "
            "it. Call backward() inside the context, or use model.gradient_checkpointing_enable()."
        )
    task = torch._C._current_graph_task_id()
    if task not in _in_backward:
        _in_backward[task] = weakref.WeakSet()
        torch.autograd.Variable._execution_engine.queue_callback(partial(_gradients_end, task))
    _in_backward[task].add(call)


def _gradients_end(task: int) -> None:
    _in_backward.pop(task, None)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Those in what a model returned."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, (tuple, list)) else []


# --- on a model, and off ------------------------------------------------------------------------------------------


def require_unmasked(model: PreTrainedModel | Decoder, parts: Mapping[str, str] | None = None) -> Decoder:
    """The model's parts, if nothing is applied to it and it is not compiled.

    Args:
        model: The model, or its parts where they were read before.
        parts: Names of parts that `wiring.read` does not find by itself.

    Raises:
        InputError: It is compiled, or a mask or a comparator is applied to it or to another model of its blocks.
        ArchitectureError: A part of the model was not found.
    """
    plain: Any = plain_model(model)
    modules = list(plain.modules()) if isinstance(plain, nn.Module) else []
    if any("_compiled_call" in vars(m) or "_orig_mod" in m._modules or m._compiled_call_impl for m in modules):
        raise InputError(
            "The model is compiled, and compiled code does not see hooks. Apply the mask to the uncompiled model, or "
            "bake a prefix with mask.bake(model, ids) and compile the plain model."
        )
    if found(modules):
        raise InputError(
            "A mask or a comparator is applied to this model already. Leave its context first, or take a loaded mask "
            "off with WeMask.detach(model)."
        )
    return wiring.read(model, parts=parts)


def found(modules: Iterable[nn.Module]) -> list[AtWork]:
    """What is at work on any of these modules."""
    marks = [vars(module)[_MARK] for module in modules if _MARK in vars(module)]
    # A shallow copy keeps the mark of what was taken off by way of the other one.
    return [at_work for at_work in dict.fromkeys(marks) if at_work.on]


def put_on(decoder: Decoder, at_work: AtWork) -> None:
    """Puts the edit to work for good; `take_off` ends it.

    Raises:
        InputError: Another thread was quicker.
    """
    model: Any = decoder.model
    own = at_work.registrations(decoder)
    # Rate 0 changes nothing: no hook is the surest way to leave every bit as it is.
    registrations = [*hooks.around(decoder.stack, at_work.begin, at_work.end), *own] if own else []
    places = [model, decoder.stack, *(block.module for block in decoder.blocks), *(place for place, *_ in own)]
    with _lock:
        if found(places):
            raise InputError("A mask or a comparator is applied to this model already, by another thread.")
        at_work.on = True
        for module in places:
            vars(module)[_MARK] = at_work
    hooks.put(registrations, owner=at_work)
    config = getattr(model, "generation_config", None)
    if config is not None:
        at_work.disable_compile = getattr(config, "disable_compile", None)
        config.disable_compile = True  # `generate` compiles by itself
    _forget_compiled_code()


def take_off(model: nn.Module, at_work: AtWork, elsewhere: Iterable[nn.Module] = ()) -> None:
    """Takes the edit off every module of the model, and those that are no longer in it; nothing of it is left."""
    at_work.on = False
    modules = [*model.modules(), *elsewhere]
    hooks.take_off(modules, at_work)
    for module in modules:
        own = vars(module)
        if own.get(_MARK) is at_work:
            del own[_MARK]
        # Somebody may have turned it off, or on with other options, in the meantime.
        if isinstance(own.get(_CHECKPOINT), _Replaying) and own[_CHECKPOINT].of is at_work:
            own[_CHECKPOINT] = own[_CHECKPOINT].original
    config = getattr(model, "generation_config", None)
    if config is not None and getattr(config, "disable_compile", None) is True:
        config.disable_compile = at_work.disable_compile
    _forget_compiled_code()


@contextmanager
def applied(decoder: Decoder, at_work: AtWork) -> Iterator[None]:
    """The edit is at work inside the context."""
    at_work.lasts = False
    before = list(decoder.model.modules())
    put_on(decoder, at_work)
    try:
        yield
    finally:
        take_off(decoder.model, at_work, before)


def _forget_compiled_code() -> None:
    """What a function around the model was compiled to is made anew, since it does not look whether there are hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
