"""Tiny models of every family, with massive activations planted where a test wants them.

A token `X` carries a private dimension that no other token has and no block writes to. In a chosen block one FFN
neuron (of every expert, where there are experts) listens to that dimension alone and writes to one other private
dimension. Its output weight is then solved for, so that the scalar has exactly the value asked for.
Nothing here uses melayer: the truth must not come from the code under test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

D_MODEL, D_FF, N_LAYERS, VOCAB = 64, 96, 8, 64
WORDS = [f"w{i}" for i in range(VOCAB - 3)]
X = VOCAB - 1  # the id of the token that becomes massive
LISTEN, SPARE = 13, 14  # the private dimension of X, and one more that stays empty
NEURON = 5

_COMMON = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": D_FF}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "llama-tied": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
    "phi3": lambda: Phi3Config(**_COMMON),
    "gemma2": lambda: Gemma2Config(**_COMMON, head_dim=16, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, head_dim=16, sliding_window=16),
    "olmo2": lambda: Olmo2Config(**_COMMON),
    "gpt2": lambda: GPT2Config(
        n_embd=D_MODEL,
        n_inner=D_FF,
        n_layer=N_LAYERS,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(
        **{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}, use_parallel_residual=False
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=16, norm_topk_prob=True),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=16
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **_COMMON, **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=D_FF, norm_topk_prob=True
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(**_COMMON, **_LINEAR),
    "granite": lambda: GraniteConfig(**_COMMON, residual_multiplier=0.22),
}
FAMILIES = tuple(CONFIGS)
HYBRID = ("qwen3_next", "qwen3_5")
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss", "qwen3_next")
PARALLEL = ("gpt_neox",)


def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> nn.Module:
    """A random model of the family, in eval mode; nothing in it is massive."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # gpt-oss leaves its expert and sink parameters uninitialised memory apart from its own init; make all definite.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return model.to(dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `w0`…, `X` for the special token, `<s>` as BOS (not added by itself)."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS[:-1])} | {"X": X}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w0"
    )


def beginning_tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """The same, but it puts BOS in front of every text by itself, and the end of text behind it if asked."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def text(n_tokens: int, *, x_at: int | None, seed: int = 0) -> str:
    """`n_tokens` random words, with X at one place."""
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[i] for i in torch.randint(0, len(WORDS) - 1, (n_tokens,), generator=generator)]
    if x_at is not None:
        words[x_at] = "X"
    return " ".join(words)


# --- the parts of each family, by attribute ------------------------------------------------------------------------


def blocks(model: nn.Module) -> nn.ModuleList:
    base = getattr(model, "model", None) or getattr(model, "transformer", None) or model.gpt_neox
    return getattr(base, "layers", None) or base.h


def ffn(block: nn.Module) -> nn.Module:
    return block.mlp


def mixer(block: nn.Module) -> nn.Module:
    return next(getattr(block, n) for n in ("self_attn", "linear_attn", "attn", "attention") if hasattr(block, n))


def ffn_post_norm(block: nn.Module) -> nn.Module | None:
    return getattr(block, "post_feedforward_layernorm", None)


def _out_projection(module: nn.Module) -> torch.Tensor:
    """The output projection as a view [d_model, in]."""
    for name in ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h"):
        if hasattr(module, name):
            found = getattr(module, name)
            return found.weight.T if hasattr(found, "nf") else found.weight
    raise AssertionError(type(module))


def _dense_parts(block: nn.Module) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """For each FFN or expert: the matrices that read, as views [neurons, d_model] (gate, up; fused ones split), and
    the one that writes, as a view [d_model, neurons]."""
    module = ffn(block)
    found = []
    if hasattr(module, "experts"):
        experts = module.experts
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            if gate_up.shape[0] == D_MODEL:  # gpt-oss: [d_model, 2 * neurons], gate and up interleaved
                found.append(([gate_up.T[::2], gate_up.T[1::2]], down.T))
            else:
                found.append((list(gate_up.chunk(2)), down))
        if hasattr(module, "shared_expert"):
            found += _dense_of(module.shared_expert)
        return found
    return _dense_of(module)


def _dense_of(module: nn.Module) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    write = _out_projection(module)
    if hasattr(module, "gate_up_proj"):
        return [(list(module.gate_up_proj.weight.chunk(2)), write)]
    if hasattr(module, "gate_proj"):
        return [([module.gate_proj.weight, module.up_proj.weight], write)]
    if hasattr(module, "c_fc"):
        return [([module.c_fc.weight.T], write)]
    return [([module.dense_h_to_4h.weight], write)]


def _embeddings(model: nn.Module) -> list[torch.Tensor]:
    tables = [model.get_input_embeddings().weight]
    if hasattr(model, "transformer"):
        tables.append(model.transformer.wpe.weight)
    return tables


# --- planting ------------------------------------------------------------------------------------------------------


def plant(
    model: nn.Module, writes: list[tuple[int, int, float]], *, context: str = "X", x_norm: float = 20.0
) -> nn.Module:
    """Make block `layer` write `value` into dimension `dim` of token X, for each (layer, dim, value), in place.

    In the text `context` the scalar that stands in the residual stream is exactly the sum of the values written so
    far; in another text the words before X move it by a percent or so.
    """
    ids = tokenizer()(context, return_tensors="pt")["input_ids"]
    dims = sorted({dim for _, dim, _ in writes})
    with torch.no_grad():
        for table in _embeddings(model):
            table[:, [LISTEN, SPARE, *dims]] = 0
        model.get_input_embeddings().weight[X, LISTEN] = x_norm
        for block in blocks(model):
            _silence(block, [LISTEN, SPARE, *dims])
        for layer, dim, value in sorted(writes):
            _write(model, ids, layer, dim, value)
    return model


def _silence(block: nn.Module, dims: list[int]) -> None:
    """Nothing in the block writes to these dimensions."""
    _out_projection(mixer(block))[dims] = 0
    for _, write in _dense_parts(block):
        write[dims] = 0
    for module in (mixer(block), ffn(block)):
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in ("bias", "down_proj_bias") and parameter.shape[-1] == D_MODEL:
                parameter[..., dims] = 0


def _write(model: nn.Module, ids: torch.Tensor, layer: int, dim: int, value: float) -> None:
    block = blocks(model)[layer]
    neuron = NEURON + dim % 50
    post = ffn_post_norm(block)
    for readers, write in _dense_parts(block):
        for reader in readers:
            reader[neuron] = 0
            reader[neuron, LISTEN] = 3.0
        write[:, neuron] = 0
        # Behind a post-norm only the direction matters: make this neuron's write outweigh all others.
        write[dim, neuron] = (1e4 if post is not None else 1.0) * (1 if value > 0 else -1)
    before, after = _scalar(model, ids, layer, dim)
    factor = abs(value / (after - before))
    if post is not None:
        offset = 1.0 if "Gemma" in type(post).__name__ else 0.0
        post.weight[dim] = (post.weight[dim] + offset) * factor - offset
    else:
        for _, write in _dense_parts(block):
            write[dim, neuron] *= factor


def _scalar(model: nn.Module, ids: torch.Tensor, layer: int, dim: int) -> tuple[float, float]:
    """The scalar at X and `dim`, before and after a block."""
    with capture(blocks(model)[layer]) as seen, torch.no_grad():
        model(ids, use_cache=False)
    at = int((ids[0] == X).nonzero()[0])
    return seen["in"][0, at, dim].item(), seen["out"][0, at, dim].item()


@contextlib.contextmanager
def capture(block: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The block's input and output of the last call inside the context."""
    seen: dict[str, torch.Tensor] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        seen["in"] = args[0] if args else kwargs["hidden_states"]
        seen["out"] = output if isinstance(output, torch.Tensor) else output[0]

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def write_gguf(
    path: Path,
    *,
    pre: str = "gpt-2",
    n_blocks: int = 4,
    blocks: range = range(4),
    leave_out: tuple[str, ...] = (),
    split: tuple[int, int] | None = None,
) -> None:
    """A tiny Llama as GGUF (float32), with a byte-level vocabulary and two merges.

    Whole by default; else with the weights of some blocks alone or without some weights, and perhaps with a header
    that says which part of how many the file is.
    """
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    generator = torch.Generator().manual_seed(0)
    alphabet = sorted(bytes_to_unicode().values())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "hel"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(n_blocks)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])

    def tensor(name: str, *shape: int) -> None:
        if name not in leave_out:
            writer.add_tensor(name, (torch.randn(shape, generator=generator) * 0.05).numpy())

    tensor("token_embd.weight", len(tokens), 32)
    tensor("output_norm.weight", 32)
    tensor("output.weight", len(tokens), 32)
    for i in blocks:
        tensor(f"blk.{i}.attn_norm.weight", 32)
        tensor(f"blk.{i}.ffn_norm.weight", 32)
        tensor(f"blk.{i}.attn_q.weight", 32, 32)
        tensor(f"blk.{i}.attn_k.weight", 16, 32)
        tensor(f"blk.{i}.attn_v.weight", 16, 32)
        tensor(f"blk.{i}.attn_output.weight", 32, 32)
        tensor(f"blk.{i}.ffn_gate.weight", 48, 32)
        tensor(f"blk.{i}.ffn_up.weight", 48, 32)
        tensor(f"blk.{i}.ffn_down.weight", 32, 48)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
