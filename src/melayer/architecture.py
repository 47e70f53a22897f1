"""Where a decoder keeps its blocks, norms, attention, FFN and head; nothing else knows how a family is built.

The wiring is read from the model at work, not from its family's name. A few tokens run through the model as far
as one block of each kind; which module read the very tensor that another one returned then tells norms before a
branch from norms after it, sequential residuals from parallel ones, gate from up. The result is held against the
identities `mid == block_in + attn_out` and `block_out == mid + ffn_out` before it is handed out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from melayer.errors import ArchitectureError
from melayer.hooks import Call, Point, edits_paused, measuring, record_calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Site = Literal["block_in", "attn_in", "attn_act", "attn_out", "mid", "ffn_in", "ffn_act", "ffn_out", "block_out"]
SITES: tuple[Site, ...] = (
    "block_in",
    "attn_in",
    "attn_act",
    "attn_out",
    "mid",
    "ffn_in",
    "ffn_act",
    "ffn_out",
    "block_out",
)

PARTS = ("blocks", "attention", "ffn", "final_norm")
"""The parts that `read` accepts by name where it does not find them: paths in the model, or in each block."""

# What only a token mixer is given: everything else in a block works on each token alone.
_MIXER_ARGUMENTS = frozenset(
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


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation layer with its effective scale."""

    name: str
    """Its path within the block (the final norm's: within the model)."""
    module: nn.Module

    def gamma(self, d_model: int) -> torch.Tensor:
        """The effective scale [d_model], float32: what a normalised value is multiplied by.

        Measured on the module rather than read from its weight, since families differ in what they store
        (Gemma and Qwen3-Next store gamma - 1).
        """
        if isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            weight = self.module.weight
            return torch.ones(d_model) if weight is None else weight.detach().float()
        # Zero mean and a mean square of 1, so that RMSNorm and LayerNorm both return it unchanged before gamma;
        # the size makes eps vanish. The odd part of the response drops a bias.
        probe = torch.ones(d_model, dtype=torch.float32)
        probe[1::2] = -1.0
        if d_model % 2:
            probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
        probe = probe * (d_model / probe.square().sum()).sqrt() * 1e4
        device = next((p.device for p in self.module.parameters() if p.device.type != "meta"), None)
        with torch.no_grad():
            probe = probe.to(device)[None, None]
            response = (self.module(probe) - self.module(-probe))[0, 0].float() / 2
        gamma: torch.Tensor = response / probe[0, 0] * 1e4
        return gamma


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map inside an FFN: a module, or the rows of one that holds several (Phi-3's `gate_up_proj`)."""

    name: str
    module: nn.Module
    part: Literal["whole", "first half", "second half"] = "whole"

    def weight(self) -> torch.Tensor:
        """The matrix [out, in], in the model's dtype; a view, not a copy."""
        weight = self.module.weight
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise ArchitectureError(
                f"{self.name} ({type(self.module).__name__}) holds no plain weight matrix [out, in]. "
                "Load the model without quantisation and without adapters."
            )
        # transformers' Conv1D (GPT-2) stores [in, out] and says so by its `nf` outputs.
        matrix = weight.detach().T if hasattr(self.module, "nf") else weight.detach()
        if self.part == "whole":
            return matrix
        first, second = matrix.chunk(2)
        return first if self.part == "first half" else second

    def bias(self) -> torch.Tensor | None:
        """The bias [out]; None where it has none."""
        bias = getattr(self.module, "bias", None)
        if not isinstance(bias, torch.Tensor):
            return None
        if self.part == "whole":
            return bias.detach()
        first, second = bias.detach().chunk(2)
        return first if self.part == "first half" else second


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The FFN of a block: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where there is no gate."""

    name: str
    module: nn.Module
    kind: Literal["gated", "plain", "experts", "unknown"]
    gate: Projection | None = None
    up: Projection | None = None
    down: Projection | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block: its modules, and the sites that it has."""

    layer: int
    """0-based."""
    module: nn.Module
    mixer: nn.Module
    """What moves information between tokens: softmax attention, or a linear or recurrent one."""
    attention: nn.Module | None
    """The mixer where it is softmax attention, else None."""
    ffn: FeedForward | None
    attn_norm: Norm | None
    attn_post_norm: Norm | None
    ffn_norm: Norm | None
    ffn_post_norm: Norm | None
    parallel: bool
    """Whether attention and FFN both read `block_in`, so that there is no `mid`."""
    sites: Mapping[Site, Point]
    """Where each site can be seen. A site that this block does not have is not in here."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """One view of a causal language model."""

    model: PreTrainedModel
    stack: nn.Module
    """What runs the blocks, and is given the ids, the mask, the positions and the cache."""
    embedding: nn.Module
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    head: nn.Module | None
    d_model: int
    family: str
    """`config.model_type`: a label for people, never read by the code."""
    max_positions: int | None
    """How many tokens the model was made for; None where its config does not say."""

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def embedding_output(self) -> Point:
        """The embedding's site: what enters block 0, positions and scaling included."""
        return Point(self.blocks[0].module, "input")


@dataclass(frozen=True, eq=False)
class _Wiring:
    """The names of a block's parts, shared by all blocks that are built alike."""

    mixer: str
    mixer_out: str | None
    softmax: bool
    ffn: str | None
    norms: Mapping[str, str | None]
    parallel: bool
    scale: float
    kind: Literal["gated", "plain", "experts", "unknown"]
    gate: tuple[str, Any] | None
    up: tuple[str, Any] | None
    down: str | None


class _Seen(Exception):  # noqa: N818 - a signal, not an error
    """Every kind of block has run; the rest of the forward pass has nothing to tell."""


def read(model: PreTrainedModel, *, parts: Mapping[str, str] | None = None) -> Decoder:
    """The decoder inside `model`: its blocks with their sites, its embedding, final norm and head.

    Runs six tokens through the model as far as one block of each kind.

    Args:
        model: A causal language model from transformers, also wrapped (PEFT), with its weights in place.
        parts: Names for what is not found: `blocks` and `final_norm` as paths in the model, `attention` and
            `ffn` as paths in each block. See PARTS.

    Raises:
        ArchitectureError: A part is missing or ambiguous, or the identities do not hold; the message names the
            part and the argument that supplies it.

    Example:
        >>> read(model).blocks[0].ffn.kind  # doctest: +SKIP
        'gated'
    """
    parts = dict(parts or {})
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ArchitectureError(f"There is no part {unknown[0]!r} to name; expected one of {', '.join(PARTS)}.")
    _refuse_empty(model)
    candidates = block_lists(model, parts)
    # A mask that is applied would stand between a norm and its reader.
    with edits_paused():
        calls = _trace(model, candidates)
    path, blocks = next(((path, blocks) for path, blocks in candidates.items() if path in calls), (None, None))
    if path is None or blocks is None:
        raise ArchitectureError(
            f"None of the block lists of {type(model).__name__} ({', '.join(candidates)}) runs on text. "
            + _advice("blocks", "model.layers")
        )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    traced = calls[path]
    _refuse_bidirectional(model, next(iter(traced.values())))
    wirings = {
        signature: _wire(blocks[layer], layer, events, config, parts) for signature, (layer, events) in traced.items()
    }
    built = tuple(_build(layer, block, wirings[_signature(block)]) for layer, block in enumerate(blocks))
    block_in = next(iter(traced.values()))[1][-1].read
    assert block_in is not None
    return Decoder(
        model=model,
        stack=model.get_submodule(path.rpartition(".")[0]),
        embedding=model.get_input_embeddings(),
        blocks=built,
        final_norm=_final_norm(model, path, parts),
        head=model.get_output_embeddings(),
        d_model=block_in.shape[-1],
        family=str(model.config.model_type),
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _advice(part: str, example: str) -> str:
    return f"Name it: parts={{{part!r}: {example!r}}}, or --part {part}={example}."


def _refuse_empty(model: nn.Module) -> None:
    parameters = list(model.parameters())
    # accelerate keeps offloaded weights on the meta device and brings them in for each call; it leaves a mark.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not parameters or (all(p.device.type == "meta" for p in parameters) and not offloaded):
        raise ArchitectureError(
            f"{type(model).__name__} holds no weights (all are on the meta device), so nothing can be measured. "
            "Load a checkpoint into it first."
        )


# --- finding the blocks -------------------------------------------------------------------------------------------


def block_lists(model: nn.Module, parts: Mapping[str, str]) -> dict[str, nn.ModuleList]:
    """The module lists that look like decoder blocks, by path, longest first; no weights are needed to tell."""
    if "blocks" in parts:
        found = _submodule(model, parts["blocks"], "blocks")
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise ArchitectureError(f"{parts['blocks']!r} is not a list of blocks but a {type(found).__name__}.")
        return {parts["blocks"]: found}
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all("attention" in parts or any(_mixes(child) for child in block.children()) for block in module)
    }
    if not lists:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of blocks with an attention in each. "
            + _advice("blocks", "model.layers")
        )
    return dict(sorted(lists.items(), key=lambda item: -len(item[1])))


def _submodule(owner: nn.Module, path: str, part: str) -> nn.Module:
    try:
        return owner.get_submodule(path)
    except AttributeError as error:
        raise ArchitectureError(f"{type(owner).__name__} has no part {path!r}, given for {part!r}: {error}.") from error


def _signature(block: nn.Module) -> str:
    """What the block is built of; blocks with the same signature are wired alike."""
    return " ".join(f"{name}:{type(module).__name__}" for name, module in block.named_modules())


def _mixes(module: nn.Module) -> bool:
    return bool(_MIXER_ARGUMENTS & set(inspect.signature(type(module).forward).parameters))


def _is_norm(module: nn.Module) -> bool:
    if next(module.children(), None) is not None:
        return False
    parameters = list(module.parameters(recurse=False))
    return all(p.ndim <= 1 for p in parameters) and (bool(parameters) or "norm" in type(module).__name__.lower())


def _trace(model: PreTrainedModel, lists: Mapping[str, nn.ModuleList]) -> dict[str, dict[str, tuple[int, list[Call]]]]:
    """For each list that runs, for each kind of block: the first such block's layer and calls, the block's own last."""
    watched: list[tuple[str, nn.Module]] = []
    owners: dict[str, tuple[str, str, int, str]] = {}
    for path, blocks in lists.items():
        kinds: set[str] = set()
        for layer, block in enumerate(blocks):
            signature = _signature(block)
            if signature in kinds:
                continue
            kinds.add(signature)
            for name, module in block.named_modules():
                if name.count(".") <= 1:
                    key = f"{path}/{layer}/{name}"
                    owners[key] = (path, signature, layer, name)
                    watched.append((key, module))
    calls: dict[str, dict[str, tuple[int, list[Call]]]] = {}
    expected = {path: len({_signature(block) for block in blocks}) for path, blocks in lists.items()}
    finished: dict[str, int] = {}

    def note(call: Call) -> None:
        path, signature, layer, name = owners[call.name]
        event = Call(name, call.read, call.returned, call.keywords, call.returns_tuple)
        calls.setdefault(path, {}).setdefault(signature, (layer, []))[1].append(event)
        if name == "":
            finished[path] = finished.get(path, 0) + 1
            if finished[path] == expected[path]:
                raise _Seen

    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    n_tokens = model.get_input_embeddings().weight.shape[0]
    # Two rows that differ in the last token only: what a causal model makes of the others is the same.
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % n_tokens
    with measuring(model), record_calls(watched, note), suppress(_Seen):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return calls


def _refuse_bidirectional(model: nn.Module, traced: tuple[int, list[Call]]) -> None:
    out = traced[1][-1].returned
    assert out is not None
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


# --- reading one block --------------------------------------------------------------------------------------------


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether both are the same numbers in memory, so that one module read what the other returned."""
    if a is None or b is None:
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype)


def _wire(block: nn.Module, layer: int, events: list[Call], config: Any, parts: Mapping[str, str]) -> _Wiring:
    where = f"block {layer} ({type(block).__name__})"
    whole = events[-1]
    calls = {call.name: call for call in events[:-1]}
    modules = dict(block.named_modules())
    norms = [name for name in calls if "." not in name and _is_norm(modules[name])]
    branches = [
        name
        for name in calls
        if "." not in name and name not in norms and any(p.ndim > 1 for p in modules[name].parameters())
    ]
    mixer = _named(block, parts, "attention") or _only(
        [name for name in branches if _mixes(modules[name]) or calls[name].keywords & _MIXER_ARGUMENTS],
        where,
        "attention",
        "self_attn",
    )
    others = [name for name in branches if name != mixer]
    ffn = _named(block, parts, "ffn") or (_only(others, where, "ffn", "mlp") if others else None)
    for name in (mixer, ffn):
        if name is not None and name not in calls:
            raise ArchitectureError(f"{where} has a part {name!r}, but it did not run on text.")

    def norm_before(branch: str) -> str | None:
        return next((name for name in norms if _same(calls[name].returned, calls[branch].read)), None)

    def norm_after(branch: str) -> str | None:
        return next((name for name in norms if _same(calls[name].read, calls[branch].returned)), None)

    roles: dict[str, str | None] = {"attn_norm": norm_before(mixer), "attn_post_norm": norm_after(mixer)}
    roles["ffn_norm"] = norm_before(ffn) if ffn else None
    roles["ffn_post_norm"] = norm_after(ffn) if ffn else None
    reads_residual = roles["ffn_norm"] or ffn
    parallel = reads_residual is not None and _same(calls[reads_residual].read, whole.read)
    scale = _check_identities(where, whole, calls, mixer, ffn, roles, parallel, config)
    types = getattr(config, "layer_types", None)
    # Softmax attention returns its weights (or None) beside its output; linear and recurrent mixers do not.
    softmax = calls[mixer].returns_tuple and not (types and types[layer] == "linear_attention")
    kind, gate, up, down = _read_ffn(ffn, calls, modules)
    return _Wiring(mixer, _writer(mixer, calls, modules), softmax, ffn, roles, parallel, scale, kind, gate, up, down)


def _named(block: nn.Module, parts: Mapping[str, str], part: str) -> str | None:
    if part not in parts:
        return None
    _submodule(block, parts[part], part)
    return parts[part]


def _only(names: list[str], where: str, part: str, example: str) -> str:
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} parts could be it ({', '.join(names)})" if names else "none of its parts looks like it"
    raise ArchitectureError(f"The {part} of {where} was not found: {found}. " + _advice(part, example))


def _check_identities(
    where: str,
    whole: Call,
    calls: Mapping[str, Call],
    mixer: str,
    ffn: str | None,
    roles: Mapping[str, str | None],
    parallel: bool,
    config: Any,
) -> float:
    """The factor on both branches under which the residual identities hold: 1, or the config's multiplier."""

    def value(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        return tensor.float().reshape(-1)

    block_in, block_out = value(whole.read), value(whole.returned)
    attn_out = value(calls[roles["attn_post_norm"] or mixer].returned)
    ffn_out = value(calls[roles["ffn_post_norm"] or ffn].returned) if ffn else torch.zeros_like(block_in)
    if not all(torch.isfinite(t).all() for t in (block_in, attn_out, ffn_out, block_out)):
        return 1.0  # Weights that give NaN cannot be checked; locate reports them.
    # Each sum is rounded a few times in the model's own dtype, and each value in float32 above.
    assert whole.returned is not None
    eps = 8 * max(torch.finfo(of).eps for of in (whole.returned.dtype, torch.float32))
    size = block_in.abs() + attn_out.abs() + ffn_out.abs()
    mid = None if parallel or ffn is None else value(calls[roles["ffn_norm"] or ffn].read)
    multiplier = float(getattr(config, "residual_multiplier", None) or 1.0)
    for scale in (multiplier, 1.0):
        after_attention = block_in + scale * attn_out
        held = ((after_attention + scale * ffn_out - block_out).abs() <= eps * size).all()
        if mid is not None:
            held = held & ((after_attention - mid).abs() <= eps * size).all()
        if held:
            return scale
    form = "block_out == block_in + attn_out + ffn_out"
    missing = "" if ffn else " No FFN was found in it. " + _advice("ffn", "mlp")
    raise ArchitectureError(
        f"{where} is built in a way that is not understood: with attention {mixer!r} and FFN {ffn!r}, "
        f"{form} does not hold (it is off by up to "
        f"{(block_in + attn_out + ffn_out - block_out).abs().max().item():.3g}). "
        f"If these are the wrong parts, name the right ones: parts={{'attention': ..., 'ffn': ...}}, or --part."
        f"{missing}"
    )


def _writer(branch: str, calls: Mapping[str, Call], modules: Mapping[str, nn.Module]) -> str | None:
    """The linear map inside a branch that returns what the branch returns; None where it has none."""
    return next(
        (
            name
            for name, call in calls.items()
            if name.startswith(f"{branch}.")
            and any(p.ndim == 2 for p in modules[name].parameters())
            and _same(call.returned, calls[branch].returned)
        ),
        None,
    )


def _read_ffn(
    ffn: str | None, calls: Mapping[str, Call], modules: Mapping[str, nn.Module]
) -> tuple[Any, tuple[str, Any] | None, tuple[str, Any] | None, str | None]:
    """Kind, gate, up and down of an FFN, from which child read what."""
    if ffn is None:
        return "unknown", None, None, None
    if any(p.ndim > 2 for p in modules[ffn].parameters()) or any(
        isinstance(module, nn.ModuleList) for module in modules[ffn].modules()
    ):
        return "experts", None, None, None
    inner = {name: call for name, call in calls.items() if name.startswith(f"{ffn}.")}
    linear = [name for name in inner if any(p.ndim == 2 for p in modules[name].parameters())]
    down = _writer(ffn, calls, modules)
    readers = [name for name in linear if _same(inner[name].read, calls[ffn].read) and name != down]
    if down is None or not readers:
        return "unknown", None, None, None
    act_reads = [call.read for name, call in inner.items() if name not in linear and call.read is not None]
    act, first = inner[down].read, inner[readers[0]].returned
    assert act is not None
    assert first is not None
    if len(readers) == 2:
        gate = next((n for n in readers if any(_same(inner[n].returned, r) for r in act_reads)), None)
        if gate is None:
            return "unknown", None, None, down
        up = readers[1 - readers.index(gate)]
        return "gated", (gate, "whole"), (up, "whole"), down
    if len(readers) != 1:
        return "unknown", None, None, down
    if first.shape[-1] == act.shape[-1]:
        return "plain", None, (readers[0], "whole"), down
    if first.shape[-1] == 2 * act.shape[-1]:
        # The activation reads a view of the fused output: its offset tells which half is the gate.
        halves = {0: "first half", act.shape[-1]: "second half"}
        for read in act_reads:
            offset = (read.data_ptr() - first.data_ptr()) // first.element_size()
            if offset in halves and read.shape[-1] == act.shape[-1]:
                gate_half = halves.pop(offset)
                return "gated", (readers[0], gate_half), (readers[0], next(iter(halves.values()))), down
    return "unknown", None, None, down


def _build(layer: int, block: nn.Module, wiring: _Wiring) -> Block:
    modules = dict(block.named_modules())
    norms = {role: Norm(name, modules[name]) if name else None for role, name in wiring.norms.items()}
    mixer = modules[wiring.mixer]
    sites: dict[Site, Point] = {"block_in": Point(block, "input")}
    if wiring.softmax:
        post = norms["attn_post_norm"]
        sites["attn_in"] = Point(mixer, "input")
        if wiring.mixer_out is not None:
            sites["attn_act"] = Point(modules[wiring.mixer_out], "input")
        sites["attn_out"] = Point(post.module if post else mixer, "output", wiring.scale)
    ffn = None
    if wiring.ffn is not None:
        module = modules[wiring.ffn]
        pre, post = norms["ffn_norm"], norms["ffn_post_norm"]
        if not wiring.parallel:
            sites["mid"] = Point(pre.module if pre else module, "input")
        sites["ffn_in"] = Point(module, "input")
        if wiring.down is not None:
            sites["ffn_act"] = Point(modules[wiring.down], "input")
        sites["ffn_out"] = Point(post.module if post else module, "output", wiring.scale)

        def projection(found: tuple[str, Any] | None) -> Projection | None:
            return Projection(found[0], modules[found[0]], found[1]) if found else None

        ffn = FeedForward(
            wiring.ffn,
            module,
            wiring.kind,
            projection(wiring.gate),
            projection(wiring.up),
            projection((wiring.down, "whole") if wiring.down else None),
        )
    sites["block_out"] = Point(block, "output")
    return Block(
        layer=layer,
        module=block,
        mixer=mixer,
        attention=mixer if wiring.softmax else None,
        ffn=ffn,
        parallel=wiring.parallel,
        sites={site: sites[site] for site in SITES if site in sites},
        **norms,
    )


def _final_norm(model: nn.Module, path: str, parts: Mapping[str, str]) -> Norm | None:
    """The last norm beside the list of blocks; None where the model has none there."""
    if "final_norm" in parts:
        return Norm(parts["final_norm"], _submodule(model, parts["final_norm"], "final_norm"))
    parent_path = path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    beside = [name for name, child in parent.named_children() if _is_norm(child)]
    if not beside:
        return None
    name = f"{parent_path}.{beside[-1]}" if parent_path else beside[-1]
    return Norm(name, model.get_submodule(name))
