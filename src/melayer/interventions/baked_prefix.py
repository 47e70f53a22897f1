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
from melayer.errors import InputError, OutputError
from melayer.interventions.mask import WeMask
from melayer.loading.source import MASK_FILE
from melayer.model import wiring
from melayer.model.decoder import Decoder, plain_model
from melayer.model.provenance import fingerprint, require_same_model
from melayer.runs import atomic, records
from melayer.runs.cache import sha256_of
from melayer.runs.json_text import json_text
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

TENSORS, ABOUT = "prefix.safetensors", "prefix.json"
VERSION = 1


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
        try:
            said, todo = f"The baked prefix in {directory} cannot be read", "Write it again."
            about = records.unsealed(records.read(directory / ABOUT, dict[str, Any], said, todo), said, todo)
            if about.get("sha256", digest := sha256_of(directory / TENSORS)) != digest:
                raise InputError(f"{said}: {TENSORS} is not as it was written (its checksum differs). {todo}")
            tensors = load_file(directory / TENSORS)
            ids = tuple(int(token) for token in about["ids"])
            computed_by = str(about["fingerprint"])
            masked = bool(about["masked"])
            pairs = [(tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in range(len(tensors) // 2)]
        except FileNotFoundError as error:
            raise InputError(
                f"{directory} holds no baked prefix ({ABOUT} and {TENSORS}). Give a directory that `quant-check --out` "
                "or BakedPrefix.save wrote."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"The prefix in {directory} cannot be read: {error}. Write it again.") from error
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
        if len(pairs) != len(blocks):
            raise InputError(
                f"The prefix in {directory} has the keys of {len(pairs)} blocks, and the model has {len(blocks)}. Bake "
                "it again with this model."
            )
        for layer, (keys, values) in enumerate(pairs):
            device = next(parameter.device for parameter in blocks[layer].module.parameters())
            device = torch.device("cpu") if device.type == "meta" else device  # offloaded
            cache.update(keys.to(device, plain.dtype), values.to(device, plain.dtype), layer)
        return cls(ids, cache, computed_by, WeMask.load(directory) if masked else None)


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
