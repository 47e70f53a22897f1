"""A model lent to a trainer and taken back: only its weights may be others afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a module consists of; everything else in it is how it is used.
_PARTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """After the context the model has its own modules, forward, hooks, config and modes again, also after an exception.

    Trainers replace its forward, put adapters into it, turn on checkpointing, and leave hooks for it. What they learned
    stays: the values of its parameters. Gradients are dropped. A model that was sharded on the way cannot be put
    together again and is left as it is.
    """
    modules = dict(model.named_modules())
    used = {module: {k: _kept(v) for k, v in vars(module).items() if k not in _PARTS} for module in modules.values()}
    own = {module: {part: dict(vars(module)[part]) for part in _PARTS} for module in modules.values()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config, generation = copy.deepcopy(model.config), copy.deepcopy(getattr(model, "generation_config", None))
    try:
        yield
    finally:
        if not _sharded(model):
            for module, attributes in used.items():
                _put_back(module, attributes)
                for part, members in own[module].items():
                    vars(module)[part].clear()
                    vars(module)[part].update(members)
            for parameter, required in grads.items():
                parameter.requires_grad = required
                parameter.grad = None
            model.config = config
            if generation is not None:
                model.generation_config = generation


def _kept(value: Any) -> Any:
    """Containers are changed in place (hooks come and go in them), so what was in them is kept."""
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in attributes and name not in _PARTS]:
        del now[name]
    for name, value in attributes.items():
        there = now.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            # The same dict: handles of hooks hold on to it.
            there.clear()
            there.update(value)
        else:
            now[name] = value


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "to_local") or hasattr(p, "ds_id") for p in model.parameters()) or any(
        "FullyShardedDataParallel" in type(module).__name__ for module in model.modules()
    )
