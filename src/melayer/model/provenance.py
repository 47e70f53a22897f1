"""Where a figure comes from: which model, in which dtype, with which versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from melayer.errors import InputError
from melayer.model.decoder import Decoder
from melayer.version import __version__

_SAMPLES = 64


@dataclass(frozen=True)
class ModelInfo:
    """What a result says about the model that it was measured on."""

    name: str
    fingerprint: str
    """Hash of the weights: names, shapes and a sample of each tensor's values; the same in every dtype."""
    dtype: str
    family: str
    n_layers: int
    d_model: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def describe(decoder: Decoder, name: str | None = None, samples: Mapping[str, torch.Tensor] | None = None) -> ModelInfo:
    """What a result says about its model.

    Args:
        decoder: The model's parts.
        name: What to call the model; by default what it was loaded from.
        samples: As `fingerprint` takes them.
    """
    parameters = [p.dtype for p in decoder.model.parameters() if p.is_floating_point()]
    return ModelInfo(
        name=name or str(getattr(decoder.model, "name_or_path", "") or type(decoder.model).__name__),
        fingerprint=fingerprint(decoder.model, samples),
        # Most of the weights' dtype: a few families keep their norms in float32.
        dtype=str(max(set(parameters), key=parameters.count)).removeprefix("torch."),
        family=decoder.family,
        n_layers=decoder.n_layers,
        d_model=decoder.d_model,
    )


def fingerprint(model: nn.Module, samples: Mapping[str, torch.Tensor] | None = None) -> str:
    """Sixteen hexadecimal digits that tell one set of weights from another, quickly and in any dtype.

    Takes every parameter's name and shape and 64 of its values, evenly spaced and rounded to bfloat16. Weights
    that are not in memory (offloaded) count with name and shape only.

    Args:
        model: Whose weights.
        samples: What `sample` took of weights that were in memory before, by name.
    """
    digest = hashlib.sha256()
    taken: dict[torch.device, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type != "meta":
            taken.setdefault(parameter.device, []).append(sample(parameter))
        elif samples is not None and name in samples:
            taken.setdefault(samples[name].device, []).append(samples[name])
    for device in sorted(taken, key=str):
        # One copy to the host for each device, not one for each parameter.
        digest.update(torch.cat(taken[device]).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def sample(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a weight that its model's fingerprint takes, on the weight's device; a copy."""
    flat = parameter.detach().reshape(-1)
    found = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
    return found.to(torch.bfloat16, copy=True)


def require_same_model(expected: str, found: str, said: str) -> None:
    """Raises InputError unless two fingerprints are of the same weights, in whatever dtype.

    Args:
        expected: The fingerprint of the model that something was made with or measured on.
        found: That of the model at hand, or of what is put beside it.
        said: The message: what is of which model, and what to do.
    """
    if expected != found:
        raise InputError(said)


def versions() -> dict[str, str]:
    """The versions of what a figure depends on."""
    return {
        "melayer": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
