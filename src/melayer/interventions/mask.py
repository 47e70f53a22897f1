"""WeMask (Shi et al. 2026, arXiv:2605.08504): relax the massive token where attention reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from melayer.errors import InputError, OutputError, border, require_known
from melayer.interventions import card, mask_file, saving
from melayer.interventions.apply import MaskAtWork, Masking, Target
from melayer.interventions.at_work import applied, found, put_on, require_unmasked, take_off
from melayer.interventions.fields import numbers, real, shown, whole
from melayer.interventions.made_for import MadeFor
from melayer.loading.source import MASK_FILE
from melayer.measurements.locate.result import LocateResult
from melayer.model import hooks, wiring
from melayer.model.decoder import Block, Decoder, plain_model
from melayer.model.forward import input_device
from melayer.model.provenance import fingerprint
from melayer.runs import atomic

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["MadeFor", "Selector", "WeMask"]

Selector = Literal["weight", "weight-low", "activation", "activation-low", "random", "dims"]


@dataclass(frozen=True)
class WeMask:
    """Which entries of which tokens are scaled down where attention reads them; a description, no state.

    At `attn_in` of each masked block, the first real token of each sequence becomes x * (1 - strength * m), with
    floor(rate * d_model) ones in m. Layers and dimensions are 0-based.

    Example:
        >>> mask = WeMask(rate=0.5, layers=range(12, 30))
        >>> with mask.apply(model):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    rate: float = 0.5
    """The share of the dimensions."""
    strength: float = 1.0
    """How much of a masked entry is taken away."""
    selector: Selector = "weight"
    """`weight`: the largest |gamma| of that block's attention norm (the paper's). `activation`: the largest |x| of
    that very token (the authors' code). `weight-low`, `activation-low`: the smallest. `random`: drawn by `seed` and
    layer. `dims`: the dimensions in `dims`, whatever the rate."""
    layers: tuple[int, ...] | None = None
    """The masked blocks; None for all with softmax attention after `me_layer`."""
    positions: Target = "first"
    """`first`: the first real token of each sequence. `massive`: every token whose largest |h| at the ME layer's
    output exceeds `massive_above`, recognised in the same forward pass."""
    seed: int = 0
    dims: tuple[int, ...] | None = None
    me_layer: int | None = None
    massive_above: float | None = None
    """A constant for each model, so that no token depends on those beside or behind it."""
    made_for: MadeFor | None = None
    by_layer: tuple[tuple[int, ...], ...] | None = None
    """For each of `layers`, in order, the dimensions that `selector` chose once: see `fixed`. None: chosen from the
    weights at hand."""

    def __post_init__(self) -> None:
        """Checks what can be checked without a model."""
        for name in ("rate", "strength"):
            self._set(name, real(name, getattr(self, name), "a share between 0 and 1", most=1.0))
        for name, known in (("selector", get_args(Selector)), ("positions", get_args(Target))):
            require_known(getattr(self, name), known, f"{name} is {shown(getattr(self, name))}")
        # Any sequence of numbers will do.
        for name in ("layers", "dims"):
            if (given := getattr(self, name)) is not None:
                self._set(name, tuple(sorted(set(numbers(name, given)))))
        self._set("seed", whole("seed", self.seed, most=2**63))
        self._check_found()
        if (self.dims is not None) != (self.selector == "dims"):
            raise InputError("dims and selector='dims' go together: give both, or neither.")
        self._check_by_layer()
        if self.layers is None and self.me_layer is None:
            raise InputError(
                "The mask has no layers. Give layers=range(first, last + 1), or make it with "
                "WeMask.from_located(melayer.locate(model, tokenizer))."
            )
        if self.positions == "massive":
            self._check_massive()

    def _check_found(self) -> None:
        """What `locate` says, where it is there."""
        if self.me_layer is not None:
            self._set("me_layer", whole("me_layer", self.me_layer))
        if self.massive_above is not None:
            self._set("massive_above", real("massive_above", self.massive_above, "a size of 0 or more"))
        if self.made_for is not None and not isinstance(self.made_for, MadeFor):
            raise InputError(f"made_for is {shown(self.made_for)}; expected a MadeFor.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_by_layer(self) -> None:
        if self.by_layer is None:
            return
        if isinstance(self.by_layer, (str, bytes, Mapping)) or not isinstance(self.by_layer, Iterable):
            raise InputError(f"by_layer is {shown(self.by_layer)}; expected a list of dimensions for each layer.")
        rows = tuple(tuple(sorted(set(numbers("by_layer", row)))) for row in self.by_layer)
        self._set("by_layer", rows)
        chosen_once = self.selector in ("weight", "weight-low", "random", "dims")
        if self.layers is None or len(rows) != len(self.layers) or not chosen_once:
            raise InputError("by_layer holds the dimensions of each of layers. Make it with mask.fixed(model).")
        if self.dims is not None and any(row != self.dims for row in rows):
            raise InputError("by_layer and dims name other dimensions. Give dims alone.")

    def _check_massive(self) -> None:
        if self.me_layer is None or self.massive_above is None:
            raise InputError(
                "positions='massive' recognises tokens at the ME layer's output: give me_layer and massive_above, "
                "or make the mask with WeMask.from_located(...)."
            )
        if self.layers is not None and self.layers and self.layers[0] <= self.me_layer:
            raise InputError(
                f"positions='massive' recognises tokens at the output of block {self.me_layer}, and block "
                f"{self.layers[0]} comes before that. Mask blocks from {self.me_layer + 1} on."
            )

    @classmethod
    def from_located(cls, located: LocateResult, **options: Any) -> WeMask:
        """The mask for what `locate` found: every block after the ME layer, unless `options` say otherwise.

        Args:
            located: What `locate` found on the model.
            options: Fields of the mask.

        Raises:
            InputError: There is no ME layer, or an option is out of range.
        """
        at = located.me_layer
        if at is None:
            raise InputError("locate found no ME layer in this model, so there is nothing to relax.")
        found = {"me_layer": at, "massive_above": located.massive_above, "made_for": MadeFor.of(located)}
        return cls(**{**found, **options})

    @contextmanager
    def apply(
        self,
        model: PreTrainedModel | Decoder,
        *,
        parts: Mapping[str, str] | None = None,
        when: Callable[[], bool] | None = None,
        saved: bool = True,
    ) -> Iterator[None]:
        """Every forward pass, `generate` and training step inside the context runs under the mask.

        The weights are never touched, and the hooks are gone afterwards, also after an exception.

        Args:
            model: A causal language model from transformers, also wrapped by PEFT; or its parts, read before.
            parts: Names of parts that `wiring.read` does not find by itself.
            when: Asked at each call of the model; where it says no, that call runs without the mask.
            saved: `model.save_pretrained` inside the context writes the mask beside the weights.

        Raises:
            InputError: The mask does not fit the model, another one is applied already, or the model is compiled.
            ArchitectureError: A part of the model was not found.

        Warns:
            MelayerWarning: The weights differ from those that the mask was made for; or, once, a masked first token
                is not massive, or no token is that the mask could act on.
        """
        decoder = require_unmasked(model, parts)
        at_work = MaskAtWork(self, self._masking(decoder), when)
        with applied(decoder, at_work):
            if saved:
                saving.bring_along(decoder, at_work)
            try:
                yield
            finally:
                saving.leave_behind(decoder.model, at_work)

    def attach(self, model: PreTrainedModel | Decoder, *, parts: Mapping[str, str] | None = None) -> None:
        """Applies the mask for good, as far as this object in memory goes; `detach` takes it off. See `apply`."""
        decoder = require_unmasked(model, parts)
        at_work = MaskAtWork(self, self._masking(decoder))
        put_on(decoder, at_work)
        saving.bring_along(decoder, at_work)

    @staticmethod
    def applied_to(model: PreTrainedModel | Decoder) -> WeMask | None:
        """The mask that is at work on a model, by whichever way it came there; None where there is none."""
        edits = [at_work.edit for at_work in found(plain_model(model).modules())]
        return next((edit for edit in edits if isinstance(edit, WeMask)), None)

    @staticmethod
    def detach(model: PreTrainedModel) -> None:
        """Takes off the mask that `attach` or `melayer.load` applied, or that a copy took along.

        Raises:
            InputError: There is none.
        """
        lasting = [at_work for at_work in found(model.modules()) if at_work.lasts]
        for at_work in lasting:
            take_off(model, at_work)
            saving.leave_behind(model, at_work)
        if not lasting:
            raise InputError("No mask is attached to this model. One applied by `with` ends with its block.")

    def fixed(self, model: PreTrainedModel | Decoder, *, parts: Mapping[str, str] | None = None) -> WeMask:
        """The same mask with its blocks and dimensions written down, so that it stays what it is when weights change.

        `weight` ranks by gamma, and training changes gamma: without this, a mask would choose other dimensions
        afterwards than the model was trained with. The activation selectors choose by token and keep doing so.

        Raises:
            InputError: The mask does not fit the model.
        """
        decoder = wiring.read(model, parts=parts)
        masking = self._masking(decoder)
        if not masking.keeps or not self.strength:
            return replace(self, layers=masking.layers)
        return replace(self, layers=masking.layers, by_layer=masking.dims)

    def selected(self, model: PreTrainedModel | Decoder) -> dict[int, tuple[int, ...]]:
        """For each masked block its masked dimensions; empty for the activation selectors, which choose by token.

        Raises:
            InputError: The mask does not fit the model.
        """
        masking = self._masking(wiring.read(model))
        return dict(zip(masking.layers, masking.dims, strict=True)) if masking.keeps else {}

    # --- fixed prefixes --------------------------------------------------------------------------------------------

    def bake(self, model: PreTrainedModel | Decoder, prefix: Sequence[int] | torch.Tensor) -> Cache:
        """The key/value cache of a fixed prefix under the mask; the plain model goes on from it as if masked.

        The first token sees only itself, so the mask changes nothing but what is in this cache. Give a copy of it to
        each call, which writes into it: `model.generate(ids, past_key_values=copy.deepcopy(cache))`, with ids that
        begin with the prefix.

        Args:
            model: The model, or its parts, read before.
            prefix: The ids that every sequence begins with, [n] or [1, n]; BOS alone will do.

        Raises:
            InputError: The prefix is empty or a batch, or the mask is on massive tokens, which may come later.
        """
        from transformers import DynamicCache

        if self.positions != "first":
            raise InputError("Only a mask on first tokens can be baked: massive ones may come after the prefix.")
        ids = torch.as_tensor(prefix)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.shape[0] != 1 or not ids.numel():
            raise InputError(f"The prefix has shape {tuple(ids.shape)}; expected one row of at least one id.")
        plain = plain_model(model)
        cache = DynamicCache(config=plain.config)
        with self.apply(model), hooks.measuring(plain):
            plain(ids.to(input_device(plain)), use_cache=True, **{hooks.cache_argument(plain): cache})
        return cache

    # --- files -----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Writes `melayer_mask.json` into a directory, beside a model's weights or alone, whole or not at all.

        Beside weights it also writes a README.md that says what loads them with the mask, unless one is there that
        others wrote.

        Raises:
            OutputError: It cannot be written.
        """
        path = Path(directory) / MASK_FILE
        text = json.dumps({"version": mask_file.VERSION, **asdict(self)}, indent=1)
        with border(f"The mask cannot be written to {path}", "Give another place.", error=OutputError):
            atomic.write_text(path, text)
            if card.holds_weights(path.parent):
                card.write(path.parent, self.words, adapter=not (path.parent / "config.json").is_file())
        return path

    @property
    def words(self) -> str:
        """The mask in a few words."""
        return f"{self.selector} {self.rate:g}, strength {self.strength:g}"

    @classmethod
    def load(cls, where: str | Path, *, revision: str | None = None) -> WeMask:
        """The mask that `save` wrote into a directory, or that a repository on the hub holds.

        Args:
            where: A directory or a hub id.
            revision: Branch, tag or commit on the hub.

        Raises:
            InputError: There is none, it is corrupt, or a newer melayer wrote it.
        """
        todo = "Give the directory that mask.save(...) wrote."
        with border(f"There is no mask at {shown(str(where))}", todo):
            path = Path(where) / MASK_FILE
            if not Path(where).is_dir():
                path = _from_hub(str(where), revision)
        try:
            values = mask_file.read(path)
        except FileNotFoundError as error:
            raise InputError(f"{where} holds no {MASK_FILE}. {todo}") from error
        try:
            made_for = values["made_for"]
            return cls(**{**values, "made_for": None if made_for is None else MadeFor(**made_for)})
        except InputError as error:
            raise InputError(f"{path} is corrupt: {error} Save it again with mask.save(...).") from error

    def as_applied(self, masking: Masking, model: nn.Module, weights: str) -> WeMask:
        """The mask as it goes beside a model that it is at work on: the same blocks and dimensions, these weights.

        Args:
            masking: What it came to when it was put on.
            model: The model, whose weights may be others by now.
            weights: Their fingerprint when it was put on.
        """
        sharded = any(hasattr(p, "to_local") or hasattr(p, "ds_id") for p in model.parameters())
        now = None if sharded else fingerprint(model)
        if now == weights:
            return self
        mask = self
        if self.selector.startswith("weight") and self.by_layer is None and self.strength:
            # It would choose by the gammas of the new weights.
            mask = replace(self, layers=masking.layers, by_layer=masking.dims)
        if self.made_for is None or hasattr(model, "peft_config"):
            return mask  # an adapter leaves the weights that the mask was made for as they are
        # Of weights that no process holds whole nothing is said.
        return replace(mask, made_for=None if now is None else replace(self.made_for, fingerprint=now))

    # --- against a model -------------------------------------------------------------------------------------------

    def _masking(self, decoder: Decoder) -> Masking:
        self._check(decoder)
        blocks = self._blocks(decoder)
        # 0.29 * 100 is a little under 29 in binary.
        count = len(self.dims) if self.dims is not None else math.floor(self.rate * decoder.d_model + 1e-9)
        by_token = self.selector in ("activation", "activation-low")
        return Masking(
            layers=tuple(blocks),
            keeps={} if by_token else {at: self._keep(of, decoder.d_model, count) for at, of in blocks.items()},
            count=count,
            largest=self.selector == "activation",
            strength=self.strength,
            target=self.positions,
            me_layer=self.me_layer,
            massive_above=self.massive_above,
        )

    def _check(self, decoder: Decoder) -> None:
        if self.made_for is not None:
            self.made_for.check(decoder)
        for dim in {*(self.dims or ()), *(dim for row in self.by_layer or () for dim in row)}:
            if not 0 <= dim < decoder.d_model:
                raise InputError(f"Dimension {dim} was given, but the model has 0 to {decoder.d_model - 1}.")
        at = self.me_layer
        if at is not None and not 0 <= at < decoder.n_layers:
            raise InputError(f"me_layer is {at}, but the model has blocks 0 to {decoder.n_layers - 1}.")

    def _blocks(self, decoder: Decoder) -> dict[int, Block]:
        if self.layers is None:
            assert self.me_layer is not None
            after = decoder.blocks[self.me_layer + 1 :]
            masked = {block.layer: block for block in after if block.attention is not None}
        else:
            self._check_layers(decoder, self.layers)
            masked = {layer: decoder.blocks[layer] for layer in self.layers}
        for layer, block in masked.items():
            shared = [other.layer for other in decoder.blocks if other.attention is block.attention]
            if len(shared) > 1:
                raise InputError(
                    f"Blocks {shared[0]} and {shared[1]} share their attention, so a mask on block {layer} would act "
                    "in each of them, more than once. Such a model cannot be masked."
                )
        return masked

    @staticmethod
    def _check_layers(decoder: Decoder, layers: Sequence[int]) -> None:
        for layer in layers:
            if not 0 <= layer < decoder.n_layers:
                raise InputError(
                    f"Layer {layer} was asked for, but the model has blocks 0 to {decoder.n_layers - 1}. "
                    "Give layers in that range, counted from 0."
                )
            if decoder.blocks[layer].attention is None:
                raise InputError(
                    f"Block {layer} has no softmax attention, so there is nothing to mask. Leave it out of the layers."
                )

    def _keep(self, block: Block, d_model: int, count: int) -> torch.Tensor:
        if self.by_layer is not None and self.layers is not None:
            chosen = torch.tensor(self.by_layer[self.layers.index(block.layer)], dtype=torch.long)
        elif self.selector == "dims":
            chosen = torch.tensor(self.dims, dtype=torch.long)
        elif self.selector == "random":
            drawn = np.random.default_rng([self.seed, block.layer]).permutation(d_model)[:count]
            chosen = torch.from_numpy(drawn)
        else:
            if block.attn_norm is None:
                raise InputError(
                    f"selector {self.selector!r} ranks dimensions by the gamma of the norm before attention, and block "
                    f"{block.layer} has none (it normalises elsewhere). Use 'activation', 'random' or 'dims'."
                )
            gamma = block.attn_norm.gamma(d_model).abs().cpu()
            chosen = gamma.topk(count, largest=self.selector == "weight").indices
        keep = torch.ones(d_model)
        keep[chosen] = 1.0 - self.strength
        return keep


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, MASK_FILE, revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"There is no mask at {shown(name)}: not a directory here, and the hub gave none ({type(error).__name__}). "
            "Give the directory that mask.save(...) wrote."
        ) from error
