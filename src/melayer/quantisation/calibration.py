"""Scales for quantised activations: the maxima of every linear input over texts, and the file they are kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from melayer.data.rows import Row, batches
from melayer.errors import InputError, OutputError, border
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.forward import forward
from melayer.model.provenance import require_same_model
from melayer.numerics.grids import Format, scales
from melayer.quantisation.linear_inputs import LinearInput, readers
from melayer.quantisation.treatments import Treatment
from melayer.runs import records
from melayer.runs.atomic import staged
from melayer.runs.cache import sha256_of
from melayer.runs.json_text import json_text
from melayer.runs.progress import Progress
from melayer.runs.records import sealed
from melayer.version import __version__

Granularity = Literal["per-tensor", "per-token", "per-channel"]
"""per-tensor and per-channel: static, from calibration texts. per-token: from the token at hand."""
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

TENSORS, ABOUT = "scales.safetensors", "scales.json"
VERSION = 1
_AGAIN = "Write them again."


@dataclass(frozen=True, eq=False)
class Maxima:
    """The largest |x| of each channel of each linear input, [d] each, float32 on the host."""

    whole: tuple[torch.Tensor, ...]
    """Over all tokens."""
    without: tuple[torch.Tensor, ...]
    """Over those that are not left out."""

    def scales(self, format: Format, granularity: Granularity, *, left_out: bool) -> tuple[torch.Tensor, ...] | None:
        """The step size of each linear input, [] or [d]; None where each token has its own."""
        if granularity == "per-token":
            return None
        maxima_of = self.without if left_out else self.whole
        return tuple(scales(of.max() if granularity == "per-tensor" else of, format) for of in maxima_of)


def maxima(
    decoder: Decoder,
    inputs: Sequence[LinearInput],
    rows: Sequence[Row],
    excluded: torch.Tensor,
    *,
    max_batch_tokens: int,
    progress: Progress | None = None,
) -> Maxima:
    """The maxima over sequences of one length, which run as they are under whatever is applied to the model.

    Args:
        decoder: The model's parts.
        inputs: Which tensors.
        rows: The sequences; `index` is their place in `excluded`.
        excluded: [n_sequences, T] the tokens to leave out.
        max_batch_tokens: Tokens in one forward pass.
        progress: Called with the tokens done and the tokens in all.
    """
    largest_of: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]] = ({}, {})
    done = 0
    for batch in batches(rows, max_batch_tokens=max_batch_tokens):
        left_out = excluded[[row.index for row in batch.rows]].flatten()
        last: list[torch.Tensor] = []

        def see(place: int, x: torch.Tensor, out: torch.Tensor = left_out, last: list[torch.Tensor] = last) -> None:
            if last and last[0] is x:  # seen at another map that reads it
                return
            last[:] = [x]
            size = x.detach().reshape(-1, x.shape[-1]).abs()
            for into, values in zip(largest_of, (size, size.masked_fill(out.to(x.device)[:, None], 0)), strict=True):
                largest = values.amax(dim=0).float()
                into[place] = torch.maximum(into[place], largest) if place in into else largest

        with hooks.watch(readers(decoder, inputs), see):
            forward(decoder.model, batch)
        done += sum(batch.lengths)
        if progress is not None:
            progress(done, sum(map(len, rows)))
    whole, without = (tuple(of[place].cpu() for place in range(len(inputs))) for of in largest_of)
    return Maxima(whole, without)


@dataclass(frozen=True)
class ScaleSet:
    """Which scales: how they were calibrated, and for which grid."""

    treatment: Treatment
    format: Format
    granularity: Granularity

    @property
    def key(self) -> str:
        """What their names in the file begin with."""
        return f"{self.treatment}/{self.format}/{self.granularity}"


def write_scales(
    directory: str | Path,
    inputs: Sequence[LinearInput],
    sets: Mapping[ScaleSet, Sequence[torch.Tensor]],
    about: Mapping[str, Any],
) -> Path:
    """Writes `scales.safetensors` and `scales.json`: for each set and linear map one step size, [] or [d].

    Args:
        directory: Made if it is missing.
        inputs: The linear inputs.
        sets: The scales of each set, in the order of `inputs`.
        about: What else the JSON says.

    Raises:
        OutputError: They cannot be written.
    """
    tensors = {
        f"{of.key}/{name}": scale.clone()  # one for each map: a reader looks for its own
        for of, steps in sets.items()
        for at, scale in zip(inputs, steps, strict=True)
        for name in at.names
    }
    values = {
        "version": VERSION,
        "melayer_version": __version__,
        **about,
        "sets": [{"key": of.key, "treatment": of.treatment, "format": of.format, "granularity": of.granularity}
                 for of in sets],
        "maps": [{"layer": at.layer, "name": name, "width": at.width} for at in inputs for name in at.names],
    }  # fmt: skip
    directory = Path(directory)
    try:
        with staged(directory, last=ABOUT) as place:
            save_file(tensors, place / TENSORS, metadata={"melayer_version": __version__})
            values["sha256"] = sha256_of(place / TENSORS)
            (place / ABOUT).write_text(json_text(sealed(values), indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"The scales cannot be written to {directory}: {reason}. Give another place.") from error
    return directory / TENSORS


def read_scales(
    directory: str | Path, inputs: Sequence[LinearInput], of: ScaleSet, fingerprint: str
) -> tuple[torch.Tensor, ...]:
    """The scales of one set, in the order of `inputs`.

    Args:
        directory: What `write_scales` was given.
        inputs: The model's linear inputs.
        of: Which set.
        fingerprint: Of the model's weights.

    Raises:
        InputError: There are none, they cannot be read, or they are of another model.
    """
    directory = Path(directory)
    said = f"The scales in {directory} cannot be read"
    try:
        about = records.read_sealed(directory / ABOUT, _About, said, _AGAIN)
        with border(said, _AGAIN):
            tensors = load_file(directory / TENSORS)
        if about.sha256 not in (None, sha256_of(directory / TENSORS)):
            raise InputError(f"{said}: {TENSORS} is not as it was written (its checksum differs). {_AGAIN}")
    except FileNotFoundError as error:
        raise InputError(f"{directory} holds no {ABOUT} and {TENSORS}. Write them with quant-check --out.") from error
    if about.version != VERSION:
        raise InputError(f"{said}: they have version {about.version}, this melayer reads {VERSION}. {_AGAIN}")
    require_same_model(
        about.model.fingerprint,
        fingerprint,
        f"The scales in {directory} are of weights with fingerprint {about.model.fingerprint}; these have "
        f"{fingerprint}. Calibrate again with this model.",
    )
    found = []
    for at in inputs:
        name = f"{of.key}/{at.names[0]}"
        if name not in tensors:
            raise InputError(f"The scales in {directory} have no {name!r}. Calibrate again with this setting.")
        scale = tensors[name]
        shapes = ((),) if of.granularity == "per-tensor" else ((at.width,),)
        fits = tuple(scale.shape) in shapes and scale.is_floating_point()
        if not fits or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise InputError(f"{said}: {name} is not {shapes[0]} of finite sizes. {_AGAIN}")
        found.append(scale)
    return tuple(found)


@dataclass
class _Model:
    fingerprint: str


@dataclass
class _Set:
    key: str
    treatment: Treatment
    format: Format
    granularity: Granularity


@dataclass
class _Map:
    layer: int
    name: str
    width: int


@dataclass
class _About:
    """What `scales.json` says; other fields describe how the scales were made."""

    version: int
    melayer_version: str
    model: _Model
    sets: list[_Set]
    maps: list[_Map]
    sha256: str | None = None
    """Of the tensors' file; the first version did not say it."""
