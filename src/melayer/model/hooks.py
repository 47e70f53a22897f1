"""The only place that registers hooks: watching tensors at named points, and leaving the model as it was."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils.hooks import RemovableHandle

from melayer.model.token_ids import require_rows

Key = TypeVar("Key")

# The ids of the modules whose edits do nothing: of the models at hand, and in the thread at hand alone.
_paused: ContextVar[frozenset[int]] = ContextVar("paused", default=frozenset())
# The call of an edited model that is being run, in the thread at hand alone.
_at_hand: ContextVar[Any] = ContextVar("at_hand", default=None)


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """The forward pass at work is to end here; the context whose mark it carries catches it."""


@dataclass(frozen=True, eq=False)
class Point:
    """A place in the forward pass where a tensor can be seen: what a module reads, or what it returns."""

    module: nn.Module
    side: Literal["input", "output"]
    scale: float = 1.0
    """What the block multiplies this tensor by before it is used (Granite's residual multiplier)."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module: the tensor it read, the tensor it returned, and the names of its keyword arguments."""

    name: str
    read: torch.Tensor | None
    returned: torch.Tensor | None
    keywords: frozenset[str]
    returns_tuple: bool


def first_tensor(value: Any) -> torch.Tensor | None:
    """The hidden state in what a module was given or returned: the tensor itself, or the first in a tuple."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((item for item in value if isinstance(item, torch.Tensor)), None)
    return None


def _input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    found = first_tensor(args)
    if found is None and "hidden_states" in kwargs:
        return first_tensor(kwargs["hidden_states"])
    return found if found is not None else first_tensor(list(kwargs.values()))


class Hook:
    """A hook as a function with its arguments, and not a closure: so it goes with a model that is copied or pickled."""

    def __init__(self, func: Callable[..., Any], *args: Any) -> None:
        """Calls `func` with these arguments and then with what torch calls hooks with."""
        self.func, self.args = func, args
        self.owner: object = None
        """What it was put there for; see `take_off`."""

    def __call__(self, *given: Any) -> Any:
        """The hook is called."""
        return self.func(*self.args, *given)


Registration = tuple[nn.Module, Literal["input", "output"], Hook]
"""A hook with its place: before a module's call, or after it."""


def seeing(points: Iterable[tuple[Key, Point]], see: Callable[[Key, torch.Tensor], None]) -> list[Registration]:
    """The hooks of `watch`."""
    show = {"input": _show_input, "output": _show_output}
    return [(point.module, point.side, Hook(show[point.side], key, point.scale, see)) for key, point in points]


def editing(points: Iterable[tuple[Key, Point]], change: Callable[[Key, torch.Tensor], Any]) -> list[Registration]:
    """The hooks of `edit`."""
    of_side = {"input": _edit_input, "output": _edit_output}
    return [(point.module, point.side, Hook(of_side[point.side], key, change)) for key, point in points]


def around(
    module: nn.Module,
    begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    end: Callable[[Any], None],
) -> list[Registration]:
    """The hooks that call `begin(module, args, kwargs)` before each call of a module and `end(output)` after it.

    The output is None where the call ended by an exception.
    """
    return [(module, "input", Hook(_begin, begin)), (module, "output", Hook(_end, end))]


def put(registrations: Iterable[Registration], owner: object = None) -> list[RemovableHandle]:
    """Registers hooks for good, in the order given."""
    handles = []
    for module, side, hook in registrations:
        hook.owner = owner
        if side == "input":
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(hook, always_call=hook.func is _end))
    return handles


def put_on_state(module: nn.Module, asked: Callable[..., None], owner: object) -> None:
    """Calls `asked(module, prefix, keep_vars)` when the module's weights are asked for, until `take_off`."""
    hook = Hook(asked)
    hook.owner = owner
    register: Callable[..., Any] = module.register_state_dict_pre_hook
    register(hook)


def before_gradients(node: Any, begin: Callable[..., None]) -> None:
    """Calls `begin(gradients)` when a backward pass comes to a node of the graph, which keeps it for its life."""
    node.register_prehook(begin)


def take_off(modules: Iterable[nn.Module], owner: object) -> None:
    """Removes the hooks that were put on these modules for `owner`: a copy of a model has them, and no handles."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and hook.owner is owner]:
                del hooks[key]
                for kind in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                    kind.pop(key, None)


def edits_of(module: nn.Module, owner: object) -> list[Registration]:
    """The edits that were put for `owner` on a module and what is in it, to be put there again."""
    found: list[Registration] = []
    for inner in module.modules():
        sides: tuple[tuple[Literal["input", "output"], Any], ...] = (
            ("input", inner._forward_pre_hooks),
            ("output", inner._forward_hooks),
        )
        for side, hooks in sides:
            for hook in hooks.values():
                if isinstance(hook, Hook) and hook.owner is owner and hook.func in (_edit_input, _edit_output):
                    found.append((inner, side, Hook(hook.func, *hook.args)))
    return found


@contextmanager
def _hooked(registrations: Iterable[Registration]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in put(registrations):
            stack.callback(handle.remove)
        yield


@contextmanager
def watch(points: Iterable[tuple[Key, Point]], see: Callable[[Key, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see(key, tensor)` at every point of every forward pass inside the context.

    The tensor is the model's own: `see` must not write into it. The hooks return nothing, so logits are
    bit-identical, and they are removed when the context ends, also by an exception.

    Args:
        points: What to watch, each with the key that `see` is given.
        see: Receives the key and the tensor [batch, seq, d].
    """
    with _hooked(seeing(points, see)):
        yield


@contextmanager
def edit(
    points: Iterable[tuple[Key, Point]], change: Callable[[Key, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Puts `change(key, tensor)` in the place of the tensor at every point of every pass inside the context.

    Edits at one point follow one another in the order given. The hooks are removed when the context ends, also by
    an exception; no weight is touched.

    Args:
        points: What to edit, each with the key that `change` is given.
        change: Receives the key and the module's own tensor (without `Point.scale`), in which it must not write.
            Returns the new tensor, or None to leave it as it is.
    """
    with _hooked(editing(points, change)):
        yield


@contextmanager
def edits_paused(model: nn.Module) -> Iterator[None]:
    """No edit of the model is at work inside the context: what its modules pass on is their own."""
    token = _paused.set(_paused.get() | {id(module) for module in model.modules()})
    try:
        yield
    finally:
        _paused.reset(token)


def paused(module: nn.Module) -> bool:
    """Whether no edit is to be at work in this module now."""
    return id(module) in _paused.get()


def at_hand() -> Any:
    """The call of a model that is being run in this thread, as whoever edits it calls it; None where there is none."""
    return _at_hand.get()


def begin_call(call: object) -> None:
    """From here on this call is at hand; None: there is none any more."""
    _at_hand.set(call)


@contextmanager
def within(call: object) -> Iterator[None]:
    """What runs inside the context is part of this call: a block that runs again, alone or for its gradients."""
    token = _at_hand.set(call)
    try:
        yield
    finally:
        _at_hand.reset(token)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that what runs forward is run again for its gradients."""
    return bool(torch._C._current_graph_task_id() != -1)


def checkpoint_around() -> object | None:
    """What the running code is checkpointed by: an autograd function's context, True for torch's without one."""
    if torch.compiler.is_compiling():
        return None
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # A module's own forward pass is not asked for its locals: that would keep its tensors alive.
        if code.co_name == "forward" and code.co_varnames and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                return context
        if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__ and code.co_name != "forward":
            return True
        frame = frame.f_back
    return None


def _show(tensor: torch.Tensor | None, module: nn.Module, side: str) -> torch.Tensor:
    if tensor is None:
        raise TypeError(f"{type(module).__name__} has no tensor at its {side}")
    return tensor


def _show_input(
    key: Any, scale: float, see: Callable[..., None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    tensor = _show(_input_tensor(args, kwargs), module, "input")
    see(key, tensor if scale == 1.0 else tensor * scale)


def _show_output(
    key: Any, scale: float, see: Callable[..., None], module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    tensor = _show(first_tensor(output), module, "output")
    see(key, tensor if scale == 1.0 else tensor * scale)


def _edit_input(
    key: Any, change: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Changes what a module is called with."""
    if paused(module):
        return None
    tensor = _show(_input_tensor(args, kwargs), module, "input")
    new = change(key, tensor)
    if new is None:
        return None
    swapped = {name: new if value is tensor else value for name, value in kwargs.items()}
    return tuple(new if value is tensor else value for value in args), swapped


def _edit_output(key: Any, change: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Changes what a module returns."""
    if paused(module):
        return None
    tensor = _show(first_tensor(output), module, "output")
    new = change(key, tensor)
    if new is None or output is tensor:
        return new
    return type(output)(new if value is tensor else value for value in output)


def _begin(begin: Callable[..., None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    begin(module, args, dict(kwargs))


def _end(end: Callable[[Any], None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    end(output)


@contextmanager
def stoppable() -> Iterator[Callable[[], NoReturn]]:
    """Yields a function that ends the forward pass inside the context from one of its hooks.

    The context ends with it, and what comes after goes on; a pass of another context is not ended.
    """
    mark = object()

    def stop() -> NoReturn:
        # Not one exception kept for all: it would hold the frames of the pass, and so its tensors.
        raise _Stop(mark)

    try:
        yield stop
    except _Stop as signal:
        if signal.args != (mark,):
            raise


@contextmanager
def record_arguments(
    modules: Iterable[tuple[Key, nn.Module]], see: Callable[[Key, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Calls `see(key, args, kwargs)` before each call of each module inside the context, with what it is called with.

    Nothing is copied, so that the module can be called again with the very same.
    """

    def before(key: Key) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(key, args, dict(kwargs))

        return hook

    with ExitStack() as stack:
        for key, module in modules:
            stack.callback(module.register_forward_pre_hook(before(key), with_kwargs=True).remove)
        yield


@contextmanager
def record_calls(modules: Iterable[tuple[str, nn.Module]], done: Callable[[Call], None]) -> Iterator[None]:
    """Calls `done(call)` after each call of each named module inside the context, in the order in which they end.

    Nothing is copied: what was read and returned are the very tensors, so that a reader can tell by identity
    which module read what another one returned.
    """

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            done(
                Call(
                    name,
                    _input_tensor(args, kwargs),
                    first_tensor(output),
                    frozenset(key for key, value in kwargs.items() if value is not None),
                    isinstance(output, (tuple, list)),
                )
            )

        return hook

    with ExitStack() as stack:
        for name, module in modules:
            stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
        yield


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout and no unknown token ids inside the context; afterwards each module trains or not as
    before.

    Raises:
        InputError: A token id is beyond the embedding.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: buffers that a forward pass caches in the model would be unusable in training.
        with torch.no_grad(), known_ids(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def known_ids(model: nn.Module) -> Iterator[None]:
    """Token ids that the model's embedding has no row for are refused inside the context.

    Raises:
        InputError: There is one.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = None if find is None else find()

    def check(key: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _input_tensor(args, kwargs)
        if ids is not None and not ids.is_floating_point():
            assert embedding is not None
            require_rows(ids, embedding, model)

    with record_arguments([] if embedding is None else [(0, embedding)], check):
        yield


def cache_argument(model: nn.Module) -> str:
    """The name under which the forward pass takes a cache: transformers 5.24 renamed past_key_values to cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
