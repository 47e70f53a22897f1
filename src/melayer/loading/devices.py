"""What the names of dtypes and devices stand for, and whether they can be used here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from melayer.errors import ModelError, border, require_known

if TYPE_CHECKING:
    import torch

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def dtype_of(name: str) -> str | torch.dtype:
    """The dtype that a name stands for, as `from_pretrained` takes it.

    Raises:
        ModelError: There is no such name.
    """
    import torch

    require_known(name, get_args(DTypeName), f"The dtype {name!r} is not known", error=ModelError)
    return name if name == "auto" else getattr(torch, name)


def placement(device_map: Any, max_memory: dict[int | str, str] | None, offload_folder: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes for a model that is not on one device; empty for one that is.

    Raises:
        ModelError: Something is given that a device map is needed for, or that is not here.
    """
    import torch

    if device_map is None:
        if max_memory is not None or offload_folder is not None:
            raise ModelError("max_memory and offload_folder go with a device map. Add --device-map auto.")
        return {}
    if isinstance(device_map, str) and device_map not in _MAPS:
        with border(f"There is no device map {device_map!r}", f"Give one of {', '.join(_MAPS)}.", error=ModelError):
            device_map = str(device_of(device_map))
    elif not isinstance(device_map, (str, dict)):
        raise ModelError(f"The device map is {device_map!r}; expected a name or a dictionary. Give e.g. auto.")
    n_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    for device in max_memory or {}:
        if device not in ("cpu", "disk", "mps", *range(n_devices)):
            there = ", ".join(map(str, [*range(n_devices), "cpu", "disk"]))
            raise ModelError(f"max_memory names the device {device!r}, and here there are {there}. Give some of these.")
    if offload_folder is not None:
        with border(f"The offload folder {offload_folder!r} cannot be used", "Give a directory.", error=ModelError):
            if Path(offload_folder).exists() and not Path(offload_folder).is_dir():
                raise ValueError("it is no directory")
    options = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    return {key: value for key, value in options.items() if value is not None}


def device_of(name: str) -> torch.device:
    """The device that a name stands for; `auto` takes CUDA, else MPS, else the CPU.

    Raises:
        ModelError: It cannot be used here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    said = f"The device {name!r} cannot be used here"
    with border(said, "Use --device auto, or cpu.", error=ModelError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of devices that there were once
        device = torch.device(name)
        if device.type == "meta":
            raise ModelError("The device 'meta' holds no numbers to measure. Use --device auto, or cpu.")
        # Computing there is the only test that holds for every kind of device and every index.
        if (torch.ones(1, device=device) + 1).item() != 2:
            raise ValueError("it does not compute")
    return device
