"""Which lists of modules look like decoder blocks, and what a module in a block looks like; nothing has to run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from melayer.errors import ArchitectureError

# What only a token mixer is given: everything else in a block works on each token alone.
MIXER_ARGUMENTS = frozenset(
    [
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "cache",
        "past_key_values",  # its name before transformers 5.24
        "past_key_value",
        "layer_past",
        "cache_params",
    ]
)


def block_lists(model: nn.Module, parts: Mapping[str, str]) -> dict[str, nn.ModuleList]:
    """The module lists that look like decoder blocks, by path, longest first; no weights are needed to tell.

    Raises:
        ArchitectureError: There is none, or the one that `parts` names is none.
    """
    if "blocks" in parts:
        named = submodule(model, parts["blocks"], "blocks")
        if not isinstance(named, nn.ModuleList) or not len(named):
            raise ArchitectureError(f"{parts['blocks']!r} is not a list of blocks but a {type(named).__name__}.")
        return {parts["blocks"]: named}
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all("attention" in parts or any(mixes(child) for child in block.children()) for block in module)
    }
    if not lists:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of blocks with an attention in each. "
            + how_to_name("blocks", "model.layers")
        )
    return dict(sorted(lists.items(), key=lambda item: -len(item[1])))


def signature(block: nn.Module) -> str:
    """What the block is built of; blocks with the same signature are wired alike."""
    return " ".join(f"{name}:{type(module).__name__}" for name, module in block.named_modules())


def mixes(module: nn.Module) -> bool:
    """Whether the module takes what only a token mixer is given."""
    return bool(MIXER_ARGUMENTS & set(inspect.signature(type(module).forward).parameters))


def is_norm(module: nn.Module) -> bool:
    """Whether it is one module with vectors for weights, if any: a normalisation layer."""
    if next(module.children(), None) is not None:
        return False
    parameters = list(module.parameters(recurse=False))
    return all(p.ndim <= 1 for p in parameters) and (bool(parameters) or "norm" in type(module).__name__.lower())


def submodule(owner: nn.Module, path: str, part: str) -> nn.Module:
    """The module at the path that was given for a part.

    Raises:
        ArchitectureError: There is none.
    """
    try:
        return owner.get_submodule(path)
    except AttributeError as error:
        raise ArchitectureError(f"{type(owner).__name__} has no part {path!r}, given for {part!r}: {error}.") from error


def how_to_name(part: str, example: str) -> str:
    """The sentence that tells how a part is named which was not found."""
    return f"Name it: parts={{{part!r}: {example!r}}}, or --part {part}={example}."
