"""The only place that registers hooks: watching tensors at named points, and leaving the model as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import nn

from melayer.model.token_ids import require_rows

Key = TypeVar("Key")

# The ids of the modules whose edits do nothing: of the models at hand, and in the thread at hand alone.
_paused: ContextVar[frozenset[int]] = ContextVar("paused", default=frozenset())


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


@contextmanager
def watch(points: Iterable[tuple[Key, Point]], see: Callable[[Key, torch.Tensor], None]) -> Iterator[None]:
    """Calls `see(key, tensor)` at every point of every forward pass inside the context.

    The tensor is the model's own: `see` must not write into it. The hooks return nothing, so logits are
    bit-identical, and they are removed when the context ends, also by an exception.

    Args:
        points: What to watch, each with the key that `see` is given.
        see: Receives the key and the tensor [batch, seq, d].
    """

    def at_input(key: Key, point: Point) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _show(_input_tensor(args, kwargs), key, point)

        return hook

    def at_output(key: Key, point: Point) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            _show(first_tensor(output), key, point)

        return hook

    def _show(tensor: torch.Tensor | None, key: Key, point: Point) -> None:
        if tensor is None:
            raise TypeError(f"{type(point.module).__name__} has no tensor at its {point.side}")
        see(key, tensor if point.scale == 1.0 else tensor * point.scale)

    with ExitStack() as stack:
        for key, point in points:
            if point.side == "input":
                handle = point.module.register_forward_pre_hook(at_input(key, point), with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(at_output(key, point))
            stack.callback(handle.remove)
        yield


@contextmanager
def edits_paused(model: nn.Module) -> Iterator[None]:
    """No edit of the model is at work inside the context: what its modules pass on is their own."""
    token = _paused.set(_paused.get() | {id(module) for module in model.modules()})
    try:
        yield
    finally:
        _paused.reset(token)


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
    with ExitStack() as stack:
        for key, point in points:
            if point.side == "input":
                hook = _input_edit(key, change)
                handle = point.module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(_output_edit(key, change))
            stack.callback(handle.remove)
        yield


def _input_edit(
    key: Key, change: Callable[[Key, torch.Tensor], torch.Tensor | None]
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """The hook that changes what a module is called with."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if id(module) in _paused.get():
            return None
        tensor = _input_tensor(args, kwargs)
        if tensor is None:
            raise TypeError(f"{type(module).__name__} has no tensor at its input")
        new = change(key, tensor)
        if new is None:
            return None
        swapped = {name: new if value is tensor else value for name, value in kwargs.items()}
        return tuple(new if value is tensor else value for value in args), swapped

    return hook


def _output_edit(key: Key, change: Callable[[Key, torch.Tensor], torch.Tensor | None]) -> Callable[..., Any]:
    """The hook that changes what a module returns."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if id(module) in _paused.get():
            return None
        tensor = first_tensor(output)
        if tensor is None:
            raise TypeError(f"{type(module).__name__} has no tensor at its output")
        new = change(key, tensor)
        if new is None or output is tensor:
            return new
        return type(output)(new if value is tensor else value for value in output)

    return hook


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
