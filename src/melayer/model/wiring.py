"""Where a decoder keeps its blocks, norms, attention, FFN and head; nothing else knows how a family is built.

The wiring is read from the model at work, not from its family's name. A few tokens run through the model as far
as one block of each kind; which module read the very tensor that another one returned then tells norms before a
branch from norms after it, sequential residuals from parallel ones, gate from up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from melayer.errors import ArchitectureError, require_known
from melayer.model.block_lists import block_lists, how_to_name, is_norm, signature, submodule
from melayer.model.block_parts import BlockParts, block_parts
from melayer.model.decoder import SITES, Block, Decoder, FeedForward, Norm, Projection, Site
from melayer.model.ffn_parts import FFNParts, ProjectionPart
from melayer.model.hooks import Point
from melayer.model.trace import TracedBlock, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("blocks", "attention", "ffn", "final_norm")
"""The parts that `read` accepts by name where it does not find them: paths in the model, or in each block."""


def read(model: PreTrainedModel | Decoder, *, parts: Mapping[str, str] | None = None) -> Decoder:
    """The decoder inside `model`: its blocks with their sites, its embedding, final norm and head.

    Runs a few tokens through the model as far as one block of each kind.

    Args:
        model: A causal language model from transformers, also wrapped (PEFT), with its weights in place. A decoder
            that was read before is returned as it is.
        parts: Names for what is not found: `blocks` and `final_norm` as paths in the model, `attention` and
            `ffn` as paths in each block. See PARTS.

    Raises:
        ArchitectureError: A part is missing or ambiguous, or the identities do not hold; the message names the
            part and the argument that supplies it.

    Example:
        >>> read(model).blocks[0].ffn.kind  # doctest: +SKIP
        'gated'
    """
    if isinstance(model, Decoder):
        return model
    parts = dict(parts or {})
    for part in sorted(parts):
        require_known(part, PARTS, f"There is no part {part!r} to name", error=ArchitectureError)
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"A {type(model).__name__} was given, which is no causal language model. Give what melayer.load(name) "
            "returns as its model."
        )
    _refuse_empty(model)
    candidates = block_lists(model, parts)
    _refuse_wrapper(model)
    traced = trace(model, candidates)
    path = next((path for path in candidates if path in traced), None)
    if path is None:
        raise ArchitectureError(
            f"None of the block lists of {type(model).__name__} ({', '.join(candidates)}) runs on text. "
            + how_to_name("blocks", "model.layers")
        )
    kinds, blocks = traced[path], candidates[path]
    first = next(iter(kinds.values()))
    _refuse_bidirectional(model, first)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    wired = {of: block_parts(blocks[kind.layer], kind, config, parts) for of, kind in kinds.items()}
    return Decoder(
        model=model,
        stack=model.get_submodule(path.rpartition(".")[0]),
        embedding=model.get_input_embeddings(),
        blocks=tuple(_block(layer, block, _parts_of(layer, block, wired)) for layer, block in enumerate(blocks)),
        final_norm=_final_norm(model, path, parts),
        head=model.get_output_embeddings(),
        d_model=first.block_in.shape[-1],
        family=str(model.config.model_type),
        max_positions=_max_positions(config),
    )


def _refuse_wrapper(model: nn.Module) -> None:
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
        raise ArchitectureError(
            f"A {type(model).__name__} was given, which is not a model of transformers. If it is put around one, give "
            "the model inside it (model.module)."
        )


def _max_positions(config: Any) -> int | None:
    """How many tokens a model was made for, where its config says so: XLNet's says -1 for any number."""
    found = getattr(config, "max_position_embeddings", None)
    if found is None or found == -1:
        return None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ArchitectureError(
            f"The model's config says max_position_embeddings = {found!r}; expected a number of tokens. Mend it."
        )
    return found


def _refuse_empty(model: nn.Module) -> None:
    parameters = list(model.parameters())
    # accelerate keeps offloaded weights on the meta device and brings them in for each call; it leaves a mark.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not parameters or (all(p.device.type == "meta" for p in parameters) and not offloaded):
        raise ArchitectureError(
            f"{type(model).__name__} holds no weights (all are on the meta device), so nothing can be measured. "
            "Load a checkpoint into it first."
        )


def _refuse_bidirectional(model: nn.Module, traced: TracedBlock) -> None:
    out = traced.block_out
    first, second = out[0, :-1].float(), out[1, :-1].float()
    if not torch.isfinite(out).all():
        return
    # The rows go through the same kernels: in a causal model they differ by rounding at most.
    tolerance = max(32 * torch.finfo(torch.float32).eps, 2 * torch.finfo(out.dtype).eps)
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise ArchitectureError(
            f"{type(model).__name__} is not a causal decoder: its first tokens change with a later one, as in an "
            "encoder such as BERT. melayer measures causal language models; give one of those."
        )


def _parts_of(layer: int, block: nn.Module, wired: Mapping[str, BlockParts]) -> BlockParts:
    """The parts of a block, which are those of the first one of its kind."""
    kind = signature(block)
    if kind not in wired:
        raise ArchitectureError(
            f"Block {layer} ({type(block).__name__}) does not run on text, so how it is built is not known. melayer "
            "measures models whose blocks all do."
        )
    return wired[kind]


def _block(layer: int, block: nn.Module, parts: BlockParts) -> Block:
    modules = dict(block.named_modules())
    mixer = modules[parts.mixer]
    norms = {role: Norm(name, modules[name]) if name else None for role, name in parts.norms.items()}
    sites: dict[Site, Point] = {"block_in": Point(block, "input"), "block_out": Point(block, "output")}
    if parts.softmax:
        post = norms["attn_post_norm"]
        sites["attn_in"] = Point(mixer, "input")
        if parts.mixer_out is not None:
            sites["attn_act"] = Point(modules[parts.mixer_out], "input")
        sites["attn_out"] = Point(post.module if post else mixer, "output", parts.scale)
    if parts.ffn is not None:
        ffn, pre, post = modules[parts.ffn.name], norms["ffn_norm"], norms["ffn_post_norm"]
        if not parts.parallel:
            sites["mid"] = Point(pre.module if pre else ffn, "input")
        sites["ffn_in"] = Point(ffn, "input")
        if parts.ffn.down is not None:
            sites["ffn_act"] = Point(modules[parts.ffn.down], "input")
        sites["ffn_out"] = Point(post.module if post else ffn, "output", parts.scale)
    return Block(
        layer=layer,
        module=block,
        mixer=mixer,
        attention=mixer if parts.softmax else None,
        ffn=None if parts.ffn is None else _feed_forward(parts.ffn, modules),
        parallel=parts.parallel,
        sites={site: sites[site] for site in SITES if site in sites},
        **norms,
    )


def _feed_forward(parts: FFNParts, modules: Mapping[str, nn.Module]) -> FeedForward:
    def projection(part: ProjectionPart | None) -> Projection | None:
        return None if part is None else Projection(part[0], modules[part[0]], part[1])

    down = None if parts.down is None else Projection(parts.down, modules[parts.down])
    return FeedForward(parts.name, modules[parts.name], parts.kind, projection(parts.gate), projection(parts.up), down)


def _final_norm(model: nn.Module, path: str, parts: Mapping[str, str]) -> Norm | None:
    """The last norm beside the list of blocks; None where the model has none there."""
    if "final_norm" in parts:
        return Norm(parts["final_norm"], submodule(model, parts["final_norm"], "final_norm"))
    parent_path = path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    beside = [name for name, child in parent.named_children() if is_norm(child)]
    if not beside:
        return None
    name = f"{parent_path}.{beside[-1]}" if parent_path else beside[-1]
    return Norm(name, model.get_submodule(name))
