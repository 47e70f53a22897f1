"""WeMask (Shi et al. 2026, arXiv:2605.08504): relax the massive token where attention reads it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from melayer.errors import InputError, MelayerWarning, OutputError, require_known
from melayer.interventions.apply import MaskHooks, Masking, Target, attach, detach, exclusive, require_unmasked
from melayer.loading.source import MASK_FILE
from melayer.measurements.locate.result import LocateResult
from melayer.model import hooks, wiring
from melayer.model.decoder import Block, Decoder, plain_model
from melayer.model.forward import input_device, require_known_tokens
from melayer.model.provenance import fingerprint
from melayer.runs import atomic

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Selector = Literal["weight", "weight-low", "activation", "activation-low", "random", "dims"]

VERSION = 1


@dataclass(frozen=True)
class MadeFor:
    """The model that a mask was made for."""

    family: str
    n_layers: int
    d_model: int
    fingerprint: str

    @classmethod
    def of(cls, located: LocateResult) -> MadeFor:
        """The model that `locate` measured."""
        model = located.model
        return cls(model.family, model.n_layers, model.d_model, model.fingerprint)

    def check(self, decoder: Decoder) -> None:
        """Raises InputError for another architecture, and warns of other weights."""
        if (decoder.family, decoder.n_layers, decoder.d_model) != (self.family, self.n_layers, self.d_model):
            raise InputError(
                f"It was made for another model: {self.family} with {self.n_layers} blocks and d_model "
                f"{self.d_model}, and this is {decoder.family} with {decoder.n_layers} and {decoder.d_model}. "
                "Make one for this model from melayer.locate(model, tokenizer)."
            )
        # Adapters rename every parameter, so that the hash of the same base model would differ.
        found = self.fingerprint if hasattr(decoder.model, "peft_config") else fingerprint(decoder.model)
        if found != self.fingerprint:
            warnings.warn(
                f"It was made for weights with fingerprint {self.fingerprint}; these have {found}. Where the ME layer "
                "is may have changed: run locate on them.",
                MelayerWarning,
                stacklevel=5,
            )


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
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1.")
        for name, known in (("selector", get_args(Selector)), ("positions", get_args(Target))):
            require_known(getattr(self, name), known, f"{name} is {getattr(self, name)!r}")
        # Any sequence of numbers will do.
        for name in ("layers", "dims"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(sorted({int(item) for item in given})))
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

    def _check_by_layer(self) -> None:
        if self.by_layer is None:
            return
        rows = tuple(tuple(int(dim) for dim in row) for row in self.by_layer)
        object.__setattr__(self, "by_layer", rows)
        if self.layers is None or len(rows) != len(self.layers) or self.selector.startswith("activation"):
            raise InputError("by_layer holds the dimensions of each of layers. Make it with mask.fixed(model).")

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
    ) -> Iterator[None]:
        """Every forward pass, `generate` and training step inside the context runs under the mask.

        The weights are never touched, and the hooks are gone afterwards, also after an exception.

        Args:
            model: A causal language model from transformers, also wrapped by PEFT; or its parts, read before.
            parts: Names of parts that `wiring.read` does not find by itself.
            when: Asked at each call of the model; where it says no, that call runs without the mask.

        Raises:
            InputError: The mask does not fit the model, another one is applied already, or the model is compiled.
            ArchitectureError: A part of the model was not found.

        Warns:
            MelayerWarning: The weights differ from those that the mask was made for; or, at the first prompt, none
                of the tokens that are masked is massive.
        """
        decoder = require_unmasked(model, parts)
        masking = self._masking(decoder)
        with ExitStack() as stack:
            stack.enter_context(exclusive(decoder))
            # Rate 0 and strength 0 change nothing: no hook is the surest way to leave every bit as it is.
            if masking.count and self.strength:
                stack.enter_context(MaskHooks(masking, decoder, when).hooked())
            yield

    def attach(self, model: PreTrainedModel | Decoder, *, parts: Mapping[str, str] | None = None) -> None:
        """Applies the mask for good, as far as this object in memory goes; `detach` takes it off. See `apply`."""
        attach(plain_model(model), self.apply(model, parts=parts))

    @staticmethod
    def detach(model: PreTrainedModel) -> None:
        """Takes off the mask that `attach` or `melayer.load` applied.

        Raises:
            InputError: There is none.
        """
        if not detach(model):
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
        layers = tuple(masking.blocks)
        if not masking.keeps or not self.strength:
            return replace(self, layers=layers)
        rows = tuple(tuple(masking.keeps[at].lt(1).nonzero().flatten().tolist()) for at in layers)
        return replace(self, layers=layers, by_layer=rows)

    def selected(self, model: PreTrainedModel | Decoder) -> dict[int, tuple[int, ...]]:
        """For each masked block its masked dimensions; empty for the activation selectors, which choose by token.

        Raises:
            InputError: The mask does not fit the model.
        """
        keeps = self._masking(wiring.read(model)).keeps
        return {layer: tuple(keep.lt(1).nonzero().flatten().tolist()) for layer, keep in keeps.items()}

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
        require_known_tokens(plain, ids)
        cache = DynamicCache(config=plain.config)
        with self.apply(model), hooks.measuring(plain):
            plain(ids.to(input_device(plain)), use_cache=True, **{hooks.cache_argument(plain): cache})
        return cache

    # --- files -----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Writes `melayer_mask.json` into a directory, beside a model's weights or alone, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        path = Path(directory) / MASK_FILE
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1)
        try:
            atomic.write_text(path, text)
        except OSError as error:
            raise OutputError(f"The mask cannot be written to {path}: {error.strerror}. Give another place.") from error
        return path

    @classmethod
    def load(cls, where: str | Path, *, revision: str | None = None) -> WeMask:
        """The mask that `save` wrote into a directory, or that a repository on the hub holds.

        Args:
            where: A directory or a hub id.
            revision: Branch, tag or commit on the hub.

        Raises:
            InputError: There is none, it is corrupt, or a newer melayer wrote it.
        """
        path = Path(where) / MASK_FILE
        if not Path(where).is_dir():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                path = Path(hf_hub_download(str(where), MASK_FILE, revision=revision))
            except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                raise InputError(
                    f"There is no mask at {where}: not a directory here, and the hub gave none "
                    f"({type(error).__name__}). Give the directory that mask.save(...) wrote."
                ) from error
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{where} holds no {MASK_FILE}. Give the directory that mask.save(...) wrote.") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} cannot be read as a mask: {error}. Save it again.") from error
        return cls._from_dict(values, path)

    @classmethod
    def _from_dict(cls, values: Any, path: Path) -> WeMask:
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise InputError(f"{path} is no mask: it has no version. Save it again.")
        version = values.pop("version")
        if version > VERSION:
            raise InputError(f"{path} has version {version}, this melayer reads {VERSION}. Install a newer melayer.")
        unknown = sorted(values.keys() - {item.name for item in fields(cls)})
        if unknown:
            raise InputError(f"{path} has an unknown field {unknown[0]!r}, so what it asks for is not known.")
        try:
            if values.get("made_for") is not None:
                values["made_for"] = MadeFor(**values["made_for"])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} is corrupt: {error}. Save it again.") from error

    # --- against a model -------------------------------------------------------------------------------------------

    def _masking(self, decoder: Decoder) -> Masking:
        self._check(decoder)
        blocks = self._blocks(decoder)
        # 0.29 * 100 is a little under 29 in binary.
        count = len(self.dims) if self.dims is not None else math.floor(self.rate * decoder.d_model + 1e-9)
        by_token = self.selector in ("activation", "activation-low")
        return Masking(
            blocks=blocks,
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
            return {block.layer: block for block in after if block.attention is not None}
        for layer in self.layers:
            if not 0 <= layer < decoder.n_layers:
                raise InputError(
                    f"Layer {layer} was asked for, but the model has blocks 0 to {decoder.n_layers - 1}. "
                    "Give layers in that range, counted from 0."
                )
            if decoder.blocks[layer].attention is None:
                raise InputError(
                    f"Block {layer} has no softmax attention, so there is nothing to mask. Leave it out of the layers."
                )
        return {layer: decoder.blocks[layer] for layer in self.layers}

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
