"""A model that a trainer had, put back as it was: only the values of its weights may be others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attributes = dict[str, tuple[Any, Any]]
"""For each attribute of an object the value, and a copy of what was in it if it is a container."""


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[None]:
    """After the context the model has its own modules, forward, hooks, config and modes again, also after an exception.

    Trainers replace its forward, put adapters into it, turn on checkpointing, and leave hooks for it. What they learned
    stays: the values of its parameters. Gradients are dropped. A model that was sharded on the way cannot be put
    together again and is left as it is.
    """
    modules = [(module, _attributes(module, copy.copy)) for module in model.modules()]
    configs = [(config, _attributes(config, copy.deepcopy)) for config in _configs(module for module, _ in modules)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        if not _sharded(model):
            for thing, attributes in (*modules, *configs):
                _put_back(thing, attributes)
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
                parameter.grad = None


def _attributes(thing: Any, copied: Callable[[Any], Any]) -> Attributes:
    return {
        name: (value, copied(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(thing).items()
    }


def _put_back(thing: Any, attributes: Attributes) -> None:
    now = vars(thing)
    for name in now.keys() - attributes.keys():
        del now[name]
    for name, (value, contents) in attributes.items():
        # The same containers: handles of hooks hold on to the dicts that they are in.
        if isinstance(value, list):
            value[:] = contents
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(contents)
        now[name] = value


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    """The configs of a model's modules, which share them, and the configs inside of these."""
    from transformers import GenerationConfig, PreTrainedConfig

    found: dict[int, Any] = {}
    things: list[Any] = list(modules)
    while things:
        for value in vars(things.pop()).values():
            if isinstance(value, (PreTrainedConfig, GenerationConfig)) and id(value) not in found:
                found[id(value)] = value
                things.append(value)
    return list(found.values())


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "to_local") or hasattr(p, "ds_id") for p in model.parameters()) or any(
        "FullyShardedDataParallel" in type(module).__name__ for module in model.modules()
    )
