"""The keys and values of a fixed prefix in full precision, as a file: what quantised inference can begin with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from melayer.data.chat import render
from melayer.errors import InputError, OutputError, border
from melayer.interventions.mask import WeMask
from melayer.loading.source import MASK_FILE
from melayer.model import hooks, wiring
from melayer.model.decoder import Decoder, plain_model
from melayer.model.forward import embedding_weight, input_device
from melayer.model.provenance import fingerprint, require_same_model
from melayer.runs import atomic, records
from melayer.runs.cache import sha256_of
from melayer.runs.json_text import json_text
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

TENSORS, ABOUT = "prefix.safetensors", "prefix.json"
VERSION = 1
_AGAIN = "Write it again."


@dataclass(frozen=True, eq=False)
class BakedPrefix:
    """The cache of the tokens that every sequence begins with, with or without a mask in it.

    Example:
        >>> baked = BakedPrefix.load("demo-quant/baked", model)  # doctest: +SKIP
        >>> model.generate(ids, past_key_values=baked.rows(1))  # doctest: +SKIP
    """

    ids: tuple[int, ...]
    cache: Cache
    """Of one row; `rows` gives copies, since the model writes into what it is given."""
    fingerprint: str
    """Of the weights that computed it."""
    mask: WeMask | None = None

    @classmethod
    def of(cls, model: PreTrainedModel | Decoder, ids: Sequence[int], mask: WeMask | None = None) -> BakedPrefix:
        """Computes it, see `WeMask.bake`.

        Raises:
            InputError: There is no id, the mask is on massive tokens, or it does not fit the model.
        """
        # A mask without blocks changes nothing, and computes the plain model's.
        cache = (mask or WeMask(rate=0, layers=())).bake(model, ids)
        return cls(tuple(int(token) for token in ids), cache, fingerprint(plain_model(model)), mask)

    def rows(self, n: int) -> Cache:
        """A copy for `n` rows, to go on from."""
        cache = copy.deepcopy(self.cache)
        if n > 1:
            cache.reorder_cache(torch.LongTensor([0] * n))
        return cache

    @property
    def unwritable(self) -> str | None:
        """Why it cannot be written as keys and values; None where it can."""
        for layer in range(len(self.cache.layers)):
            if self._keys_and_values(layer) is None:
                return (
                    f"the cache of block {layer} is not the keys and values of all {len(self.ids)} tokens (linear "
                    "attention keeps a state, a window drops old ones)"
                )
        return None

    def _keys_and_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of all tokens [1, n_kv_heads, tokens, d] in one block; None where its cache is something else."""
        cached = self.cache.layers[layer]
        keys, values = getattr(cached, "keys", None), getattr(cached, "values", None)
        if keys is None or values is None or keys.shape[-2] != len(self.ids):
            return None
        return keys, values

    @staticmethod
    def files_of(directory: Path) -> list[Path]:
        """What `save` may write into a directory."""
        return [directory / name for name in (TENSORS, ABOUT, MASK_FILE)]

    def save(self, directory: str | Path) -> Path:
        """Writes `prefix.safetensors` (`keys.0`, `values.0`, …: [1, heads, tokens, d]), `prefix.json` and the mask.

        Raises:
            InputError: The cache holds more than keys and values (linear attention), or has dropped some of them.
            OutputError: It cannot be written.
        """
        if self.unwritable is not None:
            raise InputError(f"The baked prefix cannot be written: {self.unwritable}.")
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(len(self.cache.layers)):
            pair = self._keys_and_values(layer)
            assert pair is not None  # or it would be unwritable
            tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = (tensor.contiguous().cpu() for tensor in pair)
        about: dict[str, Any] = {
            "version": VERSION,
            "melayer_version": __version__,
            "ids": list(self.ids),
            "fingerprint": self.fingerprint,
            "masked": self.mask is not None,
        }
        directory = Path(directory)
        if self.mask is not None:
            self.mask.save(directory)
        try:
            with atomic.staged(directory, last=ABOUT) as place:
                save_file(tensors, place / TENSORS, metadata={"melayer_version": __version__})
                about["sha256"] = sha256_of(place / TENSORS)
                (place / ABOUT).write_text(json_text(records.sealed(about), indent=1), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"The prefix cannot be written to {directory}: {reason}. Give another place.") from error
        return directory

    @classmethod
    def load(cls, directory: str | Path, model: PreTrainedModel | Decoder) -> BakedPrefix:
        """What `save` wrote, on the devices of the model.

        Raises:
            InputError: There is none, it cannot be read, or it is of other weights.
        """
        from transformers import DynamicCache

        directory = Path(directory)
        said = f"The prefix in {directory} cannot be read"
        try:
            about = records.read_sealed(directory / ABOUT, _About, said, _AGAIN)
            if about.version != VERSION:
                raise InputError(f"{said}: it has version {about.version}, this melayer reads {VERSION}. {_AGAIN}")
            with border(said, _AGAIN):
                tensors = load_file(_regular(directory / TENSORS))
            if about.sha256 not in (None, sha256_of(directory / TENSORS)):
                raise InputError(f"{said}: {TENSORS} is not as it was written (its checksum differs). {_AGAIN}")
            mask = WeMask.load(directory) if about.masked else None
        except FileNotFoundError as error:
            raise InputError(
                f"{directory} holds no baked prefix ({ABOUT} and {TENSORS}). Give a directory that `quant-check --out` "
                "or BakedPrefix.save wrote."
            ) from error
        ids, computed_by = tuple(about.ids), about.fingerprint
        plain = plain_model(model)
        here = fingerprint(plain)
        require_same_model(
            computed_by,
            here,
            f"The prefix in {directory} was computed by weights with fingerprint {computed_by}; these have "
            f"{here}, which would read wrong keys and values. Bake it again with this model.",
        )
        cache = DynamicCache(config=plain.config)
        blocks = wiring.read(model).blocks
        vocabulary = embedding_weight(plain).shape[0]
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise InputError(f"{said}: its ids are not from 0 to {vocabulary - 1}, or there are none. {_AGAIN}")
        pairs = _pairs(tensors, len(ids), said)
        if len(pairs) != len(blocks):
            raise InputError(
                f"The prefix in {directory} has the keys of {len(pairs)} blocks, and the model has {len(blocks)}. Bake "
                "it again with this model."
            )
        forms = _forms(plain, ids[0])
        for layer, (keys, values) in enumerate(pairs):
            if [(of.shape[1], of.shape[3]) for of in (keys, values)] != forms[layer]:
                raise InputError(f"{said}: the keys and values of block {layer} are not of the model's form. {_AGAIN}")
            device = next(parameter.device for parameter in blocks[layer].module.parameters())
            device = torch.device("cpu") if device.type == "meta" else device  # offloaded
            cache.update(keys.to(device, plain.dtype), values.to(device, plain.dtype), layer)
        return cls(ids, cache, computed_by, mask)


@dataclass
class _About:
    """What `prefix.json` says."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic looks for it here

    version: int
    melayer_version: str
    ids: list[int]
    fingerprint: str
    masked: bool
    sha256: str | None = None
    """Of the tensors' file; the first version did not say it."""


def _regular(path: Path) -> Path:
    """A file, and no pipe that nobody writes."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file. {_AGAIN}")
    return path


def _forms(model: PreTrainedModel, token: int) -> list[list[tuple[int, int]]]:
    """For each block the heads and the width of its keys and of its values, as the model makes them."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with hooks.measuring(model), hooks.edits_paused(model):
        ids = torch.tensor([[token]], device=input_device(model))
        model(ids, use_cache=True, logits_to_keep=1, **{hooks.cache_argument(model): cache})
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [[(of.shape[1], of.shape[3]) for of in pair if of is not None] for pair in pairs]


def _pairs(tensors: dict[str, torch.Tensor], n_tokens: int, said: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values by block, of the same form in all of them.

    Raises:
        InputError: One is missing or of another form, or there are others among them.
    """
    n_blocks = len(tensors) // 2
    names = [f"{kind}.{layer}" for layer in range(n_blocks) for kind in ("keys", "values")]
    if sorted(names) != sorted(tensors):
        raise InputError(f"{said}: {TENSORS} holds other tensors than keys and values of each block. {_AGAIN}")
    for name, tensor in tensors.items():
        fits = tensor.ndim == 4 and tensor.shape[0] == 1 and tensor.shape[2] == n_tokens
        if not fits or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise InputError(f"{said}: {name} is not [1, heads, {n_tokens}, d] of finite numbers. {_AGAIN}")
    return [(tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in range(n_blocks)]


def fixed_prefix(tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> list[int]:
    """The longest run of ids with which every chat begins under the tokenizer's template: what `bake` wants.

    Args:
        tokenizer: One with a chat template.
        system: A system prompt; by default the template's own, if any.

    Raises:
        InputError: The tokenizer has no chat template, or its chats have no common beginning.
    """
    if not tokenizer.chat_template:
        raise InputError("This tokenizer has no chat template, so chats have no fixed beginning. Bake BOS instead.")
    before = [] if system is None else [{"role": "system", "content": system}]
    rows = []
    # Beginnings of every kind, so that no token of the prefix has merged with one of them.
    for content in ("a", "The", "0", " x", "\n", "\n\n", "(", "中", "é", '"', "<", "#"):
        text = render(tokenizer, [*before, {"role": "user", "content": content}])
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    common = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False))]
    if not common:
        raise InputError("The chats of this template have no common beginning, so there is nothing to bake.")
    return common
