"""Models, tokenizers, adapters and GGUF files that a hostile or an unlucky user could name, made by code.

`CHECKPOINTS` maps a name to a builder: called with an empty directory, it writes what it needs there and returns what
is to be given as the model. Whatever is loaded, no code of a checkpoint may run (`ran(place)` tells) and nothing that
lies outside of it may be read (`place / "outside"` is where such things are put). Each is refused with one sentence,
apart from `HARMLESS`, which load as if nothing were wrong.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import toys

Builder = Callable[[Path], str]

MARKER = "it-ran"
CHECKPOINTS: dict[str, Builder] = {}
HARMLESS: set[str] = set()
"""Those of CHECKPOINTS that load."""
TRUSTING: set[str] = set()
"""Those that would run code or read a pickle with --trust-remote-code and --allow-pickle; never give these options."""


def ran(place: Path) -> bool:
    """Whether code out of something that was built in `place` ran."""
    return (place / MARKER).exists()


def hostile(name: str, *, harmless: bool = False) -> Callable[[Builder], Builder]:
    """Adds a builder to CHECKPOINTS."""

    def add(builder: Builder) -> Builder:
        CHECKPOINTS[name] = builder
        if harmless:
            HARMLESS.add(name)
        return builder

    return add


# --- what they are made of --------------------------------------------------------------------------------------------


@functools.cache
def _files(shards: bool = False) -> dict[str, bytes]:
    """A Llama with a massive activation, and its tokenizer, as files."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
        model.save_pretrained(place, **({"max_shard_size": "200KB"} if shards else {}))
        toys.tokenizer().save_pretrained(place)
        return {file.name: file.read_bytes() for file in place.iterdir()}


def healthy(directory: Path, *, shards: bool = False, leave_out: tuple[str, ...] = ()) -> Path:
    """A model that loads."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _files(shards).items():
        if name not in leave_out:
            (directory / name).write_bytes(content)
    return directory


def changed(path: Path, **changes: Any) -> None:
    """Puts other values into a file of JSON; None is a value, `...` takes the key out."""
    values = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        if value is ...:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def code(place: Path, directory: Path, name: str = "mine.py") -> None:
    """A Python file that leaves a mark when it runs."""
    text = f"open({str(place / MARKER)!r}, 'w').close()\n"
    text += "class MyConfig: pass\nclass MyModel: pass\nclass MyTokenizer: pass\nclass My: pass\n"
    (directory / name).write_text(text)


class _Leaves:
    """Unpickled, it leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def pickled(place: Path, path: Path) -> None:
    """A file of weights that leaves a mark when it is unpickled."""
    import pickle

    path.write_bytes(pickle.dumps(_Leaves(place / MARKER)))


def adapter(directory: Path, base: str, **changes: Any) -> Path:
    """A LoRA adapter for the healthy model."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"], "bias": "none", "inference_mode": True,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(_lora(), directory / "adapter_model.safetensors")
    return directory


def _lora() -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(toys.N_LAYERS):
        generator = torch.Generator().manual_seed(layer)
        tensors[prefix.format(layer, "A")] = torch.randn(2, toys.D_MODEL, generator=generator) * 0.01
        tensors[prefix.format(layer, "B")] = torch.randn(toys.D_MODEL, 2, generator=generator) * 0.01
    return tensors


# --- code, and what lies outside --------------------------------------------------------------------------------------


@hostile("config-auto-map")
def _config_auto_map(place: Path) -> str:
    directory = healthy(place / "m")
    own = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel", "AutoTokenizer": "mine.MyTokenizer"}
    changed(directory / "config.json", model_type="my-own", auto_map=own)
    code(place, directory)
    return str(directory)


@hostile("tokenizer-auto-map")
def _tokenizer_auto_map(place: Path) -> str:
    directory = healthy(place / "m")
    own = {"AutoTokenizer": ["mine.MyTokenizer", "mine.MyTokenizer"]}
    changed(directory / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=own)
    code(place, directory)
    return str(directory)


@hostile("adapter-tokenizer-auto-map")
def _adapter_tokenizer_auto_map(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    own = {"AutoTokenizer": ["mine.MyTokenizer", "mine.MyTokenizer"]}
    changed(directory / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=own)
    code(place, directory)
    return str(directory)


@hostile("adapter-megatron")
def _adapter_megatron(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")), megatron_config={"x": 1}, megatron_core="mine")
    code(place, directory)
    return str(directory)


@hostile("config-attention-from-the-hub")
def _attention_kernel(place: Path) -> str:
    directory = healthy(place / "m")
    changed(directory / "config.json", attn_implementation="somebody/kernel")
    return str(directory)


@hostile("pickle")
def _pickle(place: Path) -> str:
    directory = healthy(place / "m", leave_out=("model.safetensors",))
    pickled(place, directory / "pytorch_model.bin")
    return str(directory)


@hostile("pickle-behind-an-index")
def _pickle_behind_an_index(place: Path) -> str:
    directory = healthy(place / "m", leave_out=("model.safetensors",))
    pickled(place, directory / "weights.bin")
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(toys.N_LAYERS)]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(directory)


@hostile("pickle-called-safetensors")
def _pickle_called_safetensors(place: Path) -> str:
    directory = healthy(place / "m")
    pickled(place, directory / "model.safetensors")
    return str(directory)


@hostile("adapter-pickle")
def _adapter_pickle(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    (directory / "adapter_model.safetensors").unlink()
    pickled(place, directory / "adapter_model.bin")
    return str(directory)


@hostile("adapter-pickle-that-is-honest")
def _adapter_pickle_honest(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    (directory / "adapter_model.safetensors").unlink()
    torch.save(_lora(), directory / "adapter_model.bin")
    return str(directory)


def _outside(place: Path) -> Path:
    """Whole weights that lie beside the model's directory, not in it."""
    outside = place / "outside"
    outside.mkdir()
    (outside / "weights.safetensors").write_bytes(_files()["model.safetensors"])
    return outside / "weights.safetensors"


def _indexed(place: Path, name: str) -> str:
    directory = healthy(place / "m", leave_out=("model.safetensors",))
    tensors = load_file(place / "outside" / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(directory)


@hostile("index-leads-up")
def _index_leads_up(place: Path) -> str:
    _outside(place)
    return _indexed(place, "../outside/weights.safetensors")


@hostile("index-leads-up-and-a-decoy")
def _index_decoy(place: Path) -> str:
    """The file of the same name inside is another one: its hash would be reported."""
    _outside(place)
    directory = Path(_indexed(place, "../outside/weights.safetensors"))
    save_file({"other": torch.zeros(3)}, directory / "weights.safetensors", metadata={"format": "pt"})
    return str(directory)


@hostile("index-absolute")
def _index_absolute(place: Path) -> str:
    return _indexed(place, str(_outside(place)))


@hostile("index-through-a-directory-link")
def _index_through_a_link(place: Path) -> str:
    _outside(place)
    directory = Path(_indexed(place, "sub/weights.safetensors"))
    (directory / "sub").symlink_to(place / "outside")
    return str(directory)


@hostile("weights-are-a-link")
def _weights_are_a_link(place: Path) -> str:
    directory = healthy(place / "m", leave_out=("model.safetensors",))
    (directory / "model.safetensors").symlink_to(_outside(place))
    return str(directory)


@hostile("tokenizer-is-a-link")
def _tokenizer_is_a_link(place: Path) -> str:
    directory = healthy(place / "m", leave_out=("tokenizer.json",))
    (place / "outside").mkdir()
    (place / "outside" / "tokenizer.json").write_bytes(_files()["tokenizer.json"])
    (directory / "tokenizer.json").symlink_to(place / "outside" / "tokenizer.json")
    return str(directory)


@hostile("template-is-a-link")
def _template_is_a_link(place: Path) -> str:
    directory = healthy(place / "m")
    (place / "outside").mkdir()
    (place / "outside" / "secret").write_text("secret")
    (directory / "chat_template.jinja").symlink_to(place / "outside" / "secret")
    return str(directory)


@hostile("config-names-other-weights")
def _config_names_weights(place: Path) -> str:
    directory = healthy(place / "m")
    _outside(place)
    changed(directory / "config.json", transformers_weights="../outside/weights.safetensors")
    return str(directory)


@hostile("an-adapter-beside-whole-weights")
def _adapter_beside(place: Path) -> str:
    return str(adapter(healthy(place / "m"), str(place / "m")))


@hostile("claims-to-be-converted", harmless=True)
def _claims(place: Path) -> str:
    directory = healthy(place / "m")
    record = {"format": 1, "source": "good.gguf", "source_sha256": "0" * 64, "files": {}}
    (directory / "melayer-cache.json").write_text(json.dumps(record))
    return str(directory)


@hostile("a-cache-of-the-hub", harmless=True)
def _hub_cache(place: Path) -> str:
    """As the hub's client lays it out: snapshots of links to blobs."""
    repository = place / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in _files(True).items():
        (blobs / f"of-{name}").write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"of-{name}"))
    return str(snapshot)


# --- weights ----------------------------------------------------------------------------------------------------------


def _with_weights(place: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    directory = healthy(place / "m")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


_DOWN = "model.layers.4.mlp.down_proj.weight"


@hostile("a-weight-is-missing")
def _missing(place: Path) -> str:
    return _with_weights(place, lambda tensors: tensors.__delitem__(_DOWN))


@hostile("a-weight-has-another-shape")
def _another_shape(place: Path) -> str:
    return _with_weights(place, lambda tensors: tensors.update({_DOWN: torch.zeros(3, 5)}))


@hostile("a-weight-has-a-dimension-more")
def _another_rank(place: Path) -> str:
    return _with_weights(place, lambda tensors: tensors.update({_DOWN: torch.zeros(1, 64, 96)}))


@hostile("weights-are-integers")
def _integers(place: Path) -> str:
    return _with_weights(place, lambda t: t.update({_DOWN: torch.zeros(64, 96, dtype=torch.int64)}))


@hostile("a-block-too-much", harmless=True)
def _unexpected(place: Path) -> str:
    return _with_weights(place, lambda t: t.update({_DOWN.replace("4", "8"): t[_DOWN].clone()}))


@hostile("no-weights")
def _no_weights(place: Path) -> str:
    return str(healthy(place / "m", leave_out=("model.safetensors",)))


@hostile("weights-of-no-tensor")
def _no_tensor(place: Path) -> str:
    return _with_weights(place, lambda tensors: tensors.clear())


@hostile("half-a-file")
def _half(place: Path) -> str:
    directory = healthy(place / "m")
    content = _files()["model.safetensors"]
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    return str(directory)


@hostile("a-header-of-a-terabyte")
def _header(place: Path) -> str:
    directory = healthy(place / "m")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    return str(directory)


@hostile("a-shard-is-missing")
def _shard(place: Path) -> str:
    directory = healthy(place / "m", shards=True)
    sorted(directory.glob("*-of-*"))[1].unlink()
    return str(directory)


@hostile("a-weight-in-two-shards")
def _twice(place: Path) -> str:
    directory = healthy(place / "m", shards=True)
    first, second = sorted(directory.glob("*-of-*"))[:2]
    held, other = load_file(first), load_file(second)
    name = next(iter(other))
    save_file(held | {name: torch.zeros_like(other[name])}, first, metadata={"format": "pt"})
    return str(directory)


def _index_of(place: Path, text: str) -> str:
    directory = healthy(place / "m", leave_out=("model.safetensors",))
    (directory / "model.safetensors.index.json").write_text(text)
    return str(directory)


for _name, _text in {
    "index-of-nothing": '{"weight_map": {}}',
    "index-is-a-list": "[]",
    "index-is-no-json": "{",
    "index-is-deep": "[" * 100_000,
    "index-names-a-number": '{"weight_map": {"model.norm.weight": 3}}',
    "index-names-itself": '{"weight_map": {"model.norm.weight": "model.safetensors.index.json"}}',
    "index-names-nothing": '{"weight_map": {"model.norm.weight": ""}}',
    "index-names-a-nul": '{"weight_map": {"model.norm.weight": "a\\u0000.safetensors"}}',
    "index-names-a-long-one": '{"weight_map": {"model.norm.weight": "' + "a" * 300 + '.safetensors"}}',
}.items():
    CHECKPOINTS[_name] = functools.partial(_index_of, text=_text)


# --- configs ----------------------------------------------------------------------------------------------------------


def _config(place: Path, text: str | bytes | None = None, **changes: Any) -> str:
    directory = healthy(place / "m")
    if text is not None:
        (directory / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    changed_at = directory / "config.json"
    if changes:
        changed(changed_at, **changes)
    return str(directory)


for _name, _text in {
    "empty": "",
    "no-json": "{",
    "list": "[]",
    "number": "3",
    "null": "null",
    "deep": "[" * 100_000,
    "deep-inside": '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "long-integer": '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
    "not-utf-8": b'{"model_type": "\xff"}',
    "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
    "binary": bytes(range(256)) * 16,
    "nan": '{"model_type": "llama", "hidden_size": NaN}',
}.items():
    CHECKPOINTS[f"config-{_name}"] = functools.partial(_config, text=_text)

for _name, _changes in {
    "type-missing": {"model_type": ...},
    "type-unknown": {"model_type": "no-such-thing"},
    "type-number": {"model_type": 3},
    "size-string": {"hidden_size": "64"},
    "size-null": {"hidden_size": None},
    "size-zero": {"hidden_size": 0},
    "size-negative": {"hidden_size": -64},
    "size-float": {"hidden_size": 64.5},
    "size-list": {"hidden_size": [64]},
    "size-huge": {"hidden_size": 10**9},
    "size-beyond-64-bits": {"hidden_size": 10**30},
    "no-heads": {"num_attention_heads": 0},
    "heads-null": {"num_attention_heads": None},
    "heads-that-do-not-divide": {"num_attention_heads": 7, "num_key_value_heads": 3},
    "no-key-heads": {"num_key_value_heads": 0},
    "no-layers": {"num_hidden_layers": 0},
    "ten-million-layers": {"num_hidden_layers": 10_000_000},
    "layers-beyond-memory": {"num_hidden_layers": 10**15},
    "more-layers": {"num_hidden_layers": 9},
    "layers-string": {"num_hidden_layers": "8"},
    "vocabulary-huge": {"vocab_size": 10**12},
    "vocabulary-null": {"vocab_size": None},
    "inner-size-huge": {"intermediate_size": 10**12},
    "head-size-huge": {"head_dim": 10**12},
    "no-positions": {"max_position_embeddings": 0},
    "positions-string": {"max_position_embeddings": "many"},
    "activation-unknown": {"hidden_act": "no-such-thing"},
    "activation-number": {"hidden_act": 3},
    "epsilon-string": {"rms_norm_eps": "small"},
    "epsilon-null": {"rms_norm_eps": None},
    "rope-list": {"rope_parameters": [1, 2]},
    "rope-unknown": {"rope_parameters": {"rope_type": "no-such-thing", "rope_theta": 10000.0}},
    "rope-null": {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    "dtype-unknown": {"dtype": "no-such-thing"},
    "dtype-load": {"dtype": "load"},
    "dtype-number": {"dtype": 16},
    "pad-beyond": {"pad_token_id": 10**6},
    "quantisation-unknown": {"quantization_config": {"quant_method": "no-such-thing"}},
    "quantisation-list": {"quantization_config": [1]},
    "attention-unknown": {"attn_implementation": "no-such-thing"},
    "attention-number": {"attn_implementation": 3},
    "architectures-number": {"architectures": 3},
    "labels-number": {"id2label": 3},
    "bos-string": {"bos_token_id": "one"},
}.items():
    CHECKPOINTS[f"config-{_name}"] = functools.partial(_config, **_changes)
# What else is believed, or is nobody's concern here.
HARMLESS |= {"config-architectures-number"}


@hostile("generation-config-nonsense", harmless=True)
def _generation(place: Path) -> str:
    directory = healthy(place / "m")
    nonsense = {"max_length": "x", "temperature": "hot", "top_k": -3, "eos_token_id": "one", "do_sample": 7}
    (directory / "generation_config.json").write_text(json.dumps(nonsense))
    return str(directory)


@hostile("generation-config-no-json")
def _generation_no_json(place: Path) -> str:
    directory = healthy(place / "m")
    (directory / "generation_config.json").write_text("[" * 100_000)
    return str(directory)


# --- tokenizers and templates -----------------------------------------------------------------------------------------


def _tokenizer(place: Path, file: str, text: str | bytes) -> str:
    directory = healthy(place / "m")
    (directory / file).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(directory)


_JUNK: dict[str, str | bytes] = {
    "empty": "",
    "no-json": "{",
    "list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "binary": bytes(range(256)) * 16,
    "number": "3",
}
for _name, _text in _JUNK.items():
    CHECKPOINTS[f"tokenizer-{_name}"] = functools.partial(_tokenizer, file="tokenizer.json", text=_text)
    CHECKPOINTS[f"tokenizer-config-{_name}"] = functools.partial(_tokenizer, file="tokenizer_config.json", text=_text)


def _tokenizer_with(place: Path, **changes: Any) -> str:
    directory = healthy(place / "m")
    changed(directory / "tokenizer.json", **changes)
    return str(directory)


for _name, _changes in {
    "no-model": {"model": ...},
    "model-unknown": {"model": {"type": "NoSuchThing"}},
    "model-empty": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "w0"}},
    "vocabulary-list": {"model": {"type": "WordLevel", "vocab": [], "unk_token": "w0"}},
    "added-number": {"added_tokens": 3},
    "ids-negative": {"model": {"type": "WordLevel", "vocab": {"w0": -1}, "unk_token": "w0"}},
    "ids-huge": {"model": {"type": "WordLevel", "vocab": {"w0": 2**31}, "unk_token": "w0"}},
}.items():
    CHECKPOINTS[f"tokenizer-{_name}"] = functools.partial(_tokenizer_with, **_changes)


def _tokenizer_config(place: Path, **changes: Any) -> str:
    directory = healthy(place / "m")
    changed(directory / "tokenizer_config.json", **changes)
    return str(directory)


for _name, _changes in {
    "class-unknown": {"tokenizer_class": "NoSuchThing"},
    "class-number": {"tokenizer_class": 3},
    "bos-number": {"bos_token": 3},
    "bos-list": {"bos_token": ["<s>"]},
    "added-nonsense": {"added_tokens_decoder": {"x": {"content": 3}}},
    "length-string": {"model_max_length": "long"},
    "inputs": {"init_inputs": [1, 2, 3]},
    "padding-side": {"padding_side": "up"},
}.items():
    CHECKPOINTS[f"tokenizer-{_name}"] = functools.partial(_tokenizer_config, **_changes)


@hostile("tokenizer-beyond-the-embedding")
def _beyond(place: Path) -> str:
    """Every word's id is one that the model has no row for."""
    directory = healthy(place / "m")
    values = json.loads((directory / "tokenizer.json").read_text())
    values["model"]["vocab"] = {word: at + 1000 for word, at in values["model"]["vocab"].items()}
    for token in values["added_tokens"]:
        token["id"] += 1000
    (directory / "tokenizer.json").write_text(json.dumps(values))
    changed(directory / "tokenizer_config.json", added_tokens_decoder=...)
    return str(directory)


@hostile("unknown-word-beyond-the-embedding")
def _unknown_beyond(place: Path) -> str:
    directory = healthy(place / "m")
    values = json.loads((directory / "tokenizer.json").read_text())
    values["model"]["vocab"]["<far>"] = toys.VOCAB + 5
    values["model"]["unk_token"] = "<far>"
    (directory / "tokenizer.json").write_text(json.dumps(values))
    changed(directory / "tokenizer_config.json", unk_token="<far>")
    return str(directory)


TEMPLATES = {
    "template-raises": "{{ raise_exception('System role not supported') }}",
    "template-no-jinja": "{% for %}",
    "template-undefined": "{{ messages[9].content.x.y }}",
    "template-divides-by-zero": "{{ 1 // 0 }}",
    "template-recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "template-for-ever": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "template-huge": "{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxx{% endfor %}{% endfor %}",
    "template-power": "{{ 9 ** (9 ** 9) }}",
    "template-product": "{{ messages[0].content * 10 ** 12 }}",
    "template-escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "template-empty-text": "{% if messages %}{% endif %}",
}
"""Chat templates that nothing good comes of; a measurement without a template is none the worse for them."""


def _template(place: Path, text: str) -> str:
    directory = healthy(place / "m")
    (directory / "chat_template.jinja").write_text(text)
    return str(directory)


for _name, _text in TEMPLATES.items():
    CHECKPOINTS[_name] = functools.partial(_template, text=_text)
    HARMLESS.add(_name)
for _name, _value in {"template-number": 3, "template-list": [1, 2], "template-of-numbers": {"default": 3}}.items():
    CHECKPOINTS[_name] = functools.partial(_tokenizer_config, chat_template=_value)


# --- adapters ---------------------------------------------------------------------------------------------------------


@hostile("adapter-own-base")
def _own_base(place: Path) -> str:
    return str(adapter(place / "a", str(place / "a")))


@hostile("adapters-in-a-circle")
def _circle(place: Path) -> str:
    adapter(place / "b", str(place / "a"))
    return str(adapter(place / "a", str(place / "b")))


@hostile("adapter-own-base-by-a-link")
def _own_base_by_link(place: Path) -> str:
    directory = adapter(place / "a", str(place / "same"))
    (place / "same").symlink_to(directory)
    return str(directory)


@hostile("adapter-without-base")
def _without_base(place: Path) -> str:
    return str(adapter(place / "a", str(place / "nothing-here")))


def _adapter_with(place: Path, **changes: Any) -> str:
    return str(adapter(place / "a", str(healthy(place / "m")), **changes))


for _name, _changes in {
    "base-number": {"base_model_name_or_path": 3},
    "type-unknown": {"peft_type": "NO_SUCH_THING"},
    "type-number": {"peft_type": 3},
    "type-prompts": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    "type-of-others": {"peft_type": "XLORA", "adapters": {"0": "../outside"}},
    "rank-string": {"r": "2"},
    "rank-zero": {"r": 0},
    "rank-other": {"r": 3},
    "rank-huge": {"r": 10**12},
    "alpha-string": {"lora_alpha": "x"},
    "targets-nothing": {"target_modules": ["no_such_module"]},
    "targets-number": {"target_modules": 3},
    "targets-bad-pattern": {"target_modules": "("},
    "another-module": {"target_modules": ["q_proj", "v_proj"]},
}.items():
    CHECKPOINTS[f"adapter-{_name}"] = functools.partial(_adapter_with, **_changes)


def _adapter_text(place: Path, text: str) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    (directory / "adapter_config.json").write_text(text)
    return str(directory)


for _name, _text in {"no-json": "{", "list": "[]", "deep": "[" * 100_000, "empty": "{}"}.items():
    CHECKPOINTS[f"adapter-{_name}"] = functools.partial(_adapter_text, text=_text)


@hostile("adapter-without-weights")
def _adapter_without_weights(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    (directory / "adapter_model.safetensors").unlink()
    return str(directory)


@hostile("adapter-lacks-a-weight")
def _adapter_lacks(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    tensors = _lora()
    del tensors["base_model.model.model.layers.4.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, directory / "adapter_model.safetensors")
    return str(directory)


@hostile("adapter-records-another-base")
def _adapter_record(place: Path) -> str:
    directory = adapter(place / "a", str(healthy(place / "m")))
    record = {"settings": {"model": {"name": ["x"], "fingerprint": {"a": 1}}}}
    (directory / "melayer_tune.json").write_text(json.dumps(record))
    return str(directory)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _gguf(place: Path, name: str = "tiny.gguf") -> Path:
    path = place / name
    toys.write_gguf(path)
    return path


@hostile("gguf-one-part-by-header")
def _gguf_part(place: Path) -> str:
    toys.write_gguf(place / "part.gguf", blocks=range(2), split=(0, 3))
    return str(place / "part.gguf")


@hostile("gguf-one-part-by-name")
def _gguf_part_by_name(place: Path) -> str:
    toys.write_gguf(place / "tiny-00002-of-00003.gguf", blocks=range(2))
    return str(place / "tiny-00002-of-00003.gguf")


@hostile("gguf-lacks-weights")
def _gguf_lacks(place: Path) -> str:
    toys.write_gguf(place / "tiny.gguf", blocks=range(3))
    return str(place / "tiny.gguf")


@hostile("gguf-lacks-its-norm")
def _gguf_lacks_norm(place: Path) -> str:
    toys.write_gguf(place / "tiny.gguf", leave_out=("output_norm.weight",))
    return str(place / "tiny.gguf")


def _gguf_bytes(place: Path, change: Callable[[bytes], bytes]) -> str:
    path = _gguf(place)
    path.write_bytes(change(path.read_bytes()))
    return str(path)


for _name, _change in {
    "empty": lambda content: b"",
    "magic": lambda content: b"GGML" + content[4:],
    "version": lambda content: content[:4] + struct.pack("<I", 99) + content[8:],
    "big-endian": lambda content: content[:4] + struct.pack(">I", 3) + content[8:],
    "half": lambda content: content[: len(content) // 2],
    "header-only": lambda content: content[:200],
    "tensors-huge": lambda content: content[:8] + struct.pack("<Q", 2**63) + content[16:],
    "fields-huge": lambda content: content[:16] + struct.pack("<Q", 2**63) + content[24:],
    "string-huge": lambda content: content[:24] + struct.pack("<Q", 2**62) + content[32:],
}.items():
    CHECKPOINTS[f"gguf-{_name}"] = functools.partial(_gguf_bytes, change=_change)


def _gguf_nested(place: Path) -> str:
    """An array of arrays of arrays, a hundred thousand deep."""
    deep = b"".join(struct.pack("<IQ", 9, 1) for _ in range(100_000)) + struct.pack("<IQ", 4, 0)
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + deep
    (place / "deep.gguf").write_bytes(content)
    return str(place / "deep.gguf")


CHECKPOINTS["gguf-deep"] = _gguf_nested


@hostile("gguf-blocks-huge")
def _gguf_blocks(place: Path) -> str:
    toys.write_gguf(place / "tiny.gguf", n_blocks=10_000_000)
    return str(place / "tiny.gguf")


# --- files that are none, and names -----------------------------------------------------------------------------------


def _special(place: Path, file: str, make: Callable[[Path], None]) -> str:
    directory = healthy(place / "m", leave_out=(file,))
    make(directory / file)
    return str(directory)


def _socket(path: Path) -> None:
    # Its name may have 108 bytes at most, whatever the directory's.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "socket": _socket,
    "directory": Path.mkdir,
    "dangling-link": lambda path: path.symlink_to(path.parent / "nothing-here"),
    "link-to-itself": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
}
for _kind, _make in SPECIAL.items():
    for _file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        CHECKPOINTS[f"{_kind}-{_file}"] = functools.partial(_special, file=_file, make=_make)


def _made(place: Path, name: str, make: Callable[[Path], None]) -> str:
    make(place / name)
    return str(place / name)


for _kind, _make in SPECIAL.items():
    CHECKPOINTS[f"{_kind}-as-a-model"] = functools.partial(_made, name="model", make=_make)
    CHECKPOINTS[f"{_kind}-as-a-gguf"] = functools.partial(_made, name="model.gguf", make=_make)

NAMES = {
    "long": "a" * 300,
    "long-path": "/" + "/".join(["a" * 200] * 30),
    "long-gguf": "a" * 300 + ".gguf",
    "nul": "a\0b",
    "nul-path": "./a\0b",
    "no-such-user": "~nosuchuser",
    "no-such-user-below": "~nosuchuser/model",
    "empty": "",
    "blank": " ",
    "dots": "..",
    "dash": "-",
    "surrogate": "a\udc80b",
    "surrogate-path": "./a\udc80b",
    "newline": "a\nb",
    "device-zero": "/dev/zero",
    "device-null": "/dev/null",
    "url": "https://example.invalid/model",
    "hub-dots": "a/..",
    "markup": "[red]x[/]",
    "file-url": "file:///etc/passwd",
}
"""Names that are no model."""
for _name, _text in NAMES.items():
    CHECKPOINTS[f"name-{_name}"] = functools.partial(lambda place, text: text, text=_text)

# A tokenizer is whole without its config, whose class is a hint; and positional arguments come to nothing.
HARMLESS |= {"directory-tokenizer_config.json", "tokenizer-class-unknown", "tokenizer-inputs"}
# A word that the model has no row for is refused where a text has it.
HARMLESS |= {"unknown-word-beyond-the-embedding"}

OPTIONS: dict[str, tuple[str, ...]] = {
    "device-hpu": ("--device", "hpu"),
    "device-cuda": ("--device", "cuda:17"),
    "device-meta": ("--device", "meta"),
    "device-nonsense": ("--device", "nonsense"),
    "device-empty": ("--device", ""),
    "device-negative": ("--device", "cpu:-1"),
    "device-mkldnn": ("--device", "mkldnn"),
    "device-xla": ("--device", "xla"),
    "device-privateuseone": ("--device", "privateuseone"),
    "device-map-nonsense": ("--device-map", "nonsense"),
    "device-map-meta": ("--device-map", "meta"),
    "device-map-empty": ("--device-map", ""),
    "device-map-hpu": ("--device-map", "hpu"),
    "memory-of-nothing": ("--device-map", "auto", "--max-memory", "9999=1GiB"),
    "memory-of-a-word": ("--device-map", "auto", "--max-memory", "nonsense=1GiB"),
    "offload-to-a-file": ("--device-map", "auto", "--offload-folder", "/dev/null"),
    "base-of-no-adapter": ("--base", "demo"),
    "part-nowhere": ("--part", "blocks=no.such.place"),
    "part-nul": ("--part", "blocks=a\0b"),
}
"""Options of every command that loads a model, wrong for the healthy one."""
