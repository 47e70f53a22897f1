"""Which module of a block is its attention, its FFN and each of its norms, told by who read what who returned.

What is told is held against the identities `mid == block_in + attn_out` and `block_out == mid + ffn_out` before it is
handed out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from melayer.errors import ArchitectureError
from melayer.model.block_lists import MIXER_ARGUMENTS, how_to_name, is_norm, mixes, submodule
from melayer.model.ffn_parts import FFNParts, ffn_parts, same, writer
from melayer.model.hooks import Call
from melayer.model.trace import TracedBlock

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NormRole = Literal["attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"]


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The names of a block's parts, shared by all blocks that are built alike."""

    mixer: str
    mixer_out: str | None
    """The linear map that the mixer ends with."""
    softmax: bool
    """Whether the mixer is softmax attention."""
    ffn: FFNParts | None
    norms: Mapping[NormRole, str | None]
    parallel: bool
    """Whether mixer and FFN both read what the block reads."""
    scale: float
    """What both are multiplied by before they are added to the residual stream."""


def block_parts(
    block: nn.Module, traced: TracedBlock, config: PreTrainedConfig, parts: Mapping[str, str]
) -> BlockParts:
    """The parts of a block, given what ran in it.

    Args:
        block: The block.
        traced: What each of its modules read and returned.
        config: Of the language model: its residual multiplier and layer types are looked at, if it has them.
        parts: `attention` and `ffn` as paths in the block, where they are not to be found.

    Raises:
        ArchitectureError: A part is missing or ambiguous, or the identities do not hold.
    """
    where = f"block {traced.layer} ({type(block).__name__})"
    calls = traced.calls
    modules = dict(block.named_modules())
    mixer, ffn = _branches(block, where, calls, parts)
    norms = _norms(mixer, ffn, calls, [name for name in calls if "." not in name and is_norm(modules[name])])
    reads_residual = norms["ffn_norm"] or ffn
    parallel = reads_residual is not None and same(calls[reads_residual].read, traced.whole.read)
    types = getattr(config, "layer_types", None)
    return BlockParts(
        mixer=mixer,
        mixer_out=writer(mixer, calls, modules),
        # Softmax attention returns its weights (or None) beside its output; linear and recurrent mixers do not.
        softmax=calls[mixer].returns_tuple and not (types and types[traced.layer] == "linear_attention"),
        ffn=None if ffn is None else ffn_parts(ffn, calls, modules),
        norms=norms,
        parallel=parallel,
        scale=_scale(where, traced, mixer, ffn, norms, parallel, config),
    )


def _branches(
    block: nn.Module, where: str, calls: Mapping[str, Call], parts: Mapping[str, str]
) -> tuple[str, str | None]:
    """The names of the token mixer and of the FFN, if there is one."""
    modules = dict(block.named_modules())
    branches = [
        name
        for name in calls
        if "." not in name and not is_norm(modules[name]) and any(p.ndim > 1 for p in modules[name].parameters())
    ]
    mixer = _named(block, parts, "attention") or _only(
        [name for name in branches if mixes(modules[name]) or calls[name].keywords & MIXER_ARGUMENTS],
        where,
        "attention",
        "self_attn",
    )
    others = [name for name in branches if name != mixer]
    ffn = _named(block, parts, "ffn") or (_only(others, where, "ffn", "mlp") if others else None)
    for name in (mixer, ffn):
        if name is not None and name not in calls:
            raise ArchitectureError(f"{where} has a part {name!r}, but it did not run on text.")
    return mixer, ffn


def _named(block: nn.Module, parts: Mapping[str, str], part: str) -> str | None:
    if part not in parts:
        return None
    submodule(block, parts[part], part)
    return parts[part]


def _only(names: list[str], where: str, part: str, example: str) -> str:
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} parts could be it ({', '.join(names)})" if names else "none of its parts looks like it"
    raise ArchitectureError(f"The {part} of {where} was not found: {found}. " + how_to_name(part, example))


def _norms(mixer: str, ffn: str | None, calls: Mapping[str, Call], candidates: list[str]) -> dict[NormRole, str | None]:
    """Before a branch stands the norm that returned what the branch read; after it the one that read its output."""

    def before(branch: str) -> str | None:
        return next((name for name in candidates if same(calls[name].returned, calls[branch].read)), None)

    def after(branch: str) -> str | None:
        return next((name for name in candidates if same(calls[name].read, calls[branch].returned)), None)

    return {
        "attn_norm": before(mixer),
        "attn_post_norm": after(mixer),
        "ffn_norm": before(ffn) if ffn else None,
        "ffn_post_norm": after(ffn) if ffn else None,
    }


def _scale(
    where: str,
    traced: TracedBlock,
    mixer: str,
    ffn: str | None,
    norms: Mapping[NormRole, str | None],
    parallel: bool,
    config: PreTrainedConfig,
) -> float:
    """The factor on both branches under which the residual identities hold: 1, or the config's multiplier."""

    def value(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        return tensor.float().reshape(-1)

    calls = traced.calls
    block_in, block_out = value(traced.block_in), value(traced.block_out)
    attn_out = value(calls[norms["attn_post_norm"] or mixer].returned)
    ffn_out = value(calls[norms["ffn_post_norm"] or ffn].returned) if ffn else torch.zeros_like(block_in)
    if not all(torch.isfinite(t).all() for t in (block_in, attn_out, ffn_out, block_out)):
        return 1.0  # Weights that give NaN cannot be checked; locate reports them.
    # Each sum is rounded a few times in the model's own dtype, and each value in float32 above.
    eps = 8 * max(torch.finfo(of).eps for of in (traced.block_out.dtype, torch.float32))
    size = block_in.abs() + attn_out.abs() + ffn_out.abs()
    mid = None if parallel or ffn is None else value(calls[norms["ffn_norm"] or ffn].read)
    multiplier = float(getattr(config, "residual_multiplier", None) or 1.0)
    for scale in (multiplier, 1.0):
        after_attention = block_in + scale * attn_out
        holds = ((after_attention + scale * ffn_out - block_out).abs() <= eps * size).all()
        if mid is not None:
            holds = holds & ((after_attention - mid).abs() <= eps * size).all()
        if holds:
            return scale
    form = "block_out == block_in + attn_out + ffn_out"
    missing = "" if ffn else " No FFN was found in it. " + how_to_name("ffn", "mlp")
    raise ArchitectureError(
        f"{where} is built in a way that is not understood: with attention {mixer!r} and FFN {ffn!r}, "
        f"{form} does not hold (it is off by up to "
        f"{(block_in + attn_out + ffn_out - block_out).abs().max().item():.3g}). "
        f"If these are the wrong parts, name the right ones: parts={{'attention': ..., 'ffn': ...}}, or --part."
        f"{missing}"
    )
