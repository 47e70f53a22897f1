"""Files of ours as a stranger, a bug or a bad disk leaves them: masks, baked prefixes and scales that are none.

`MASKS`, `PREFIXES` and `SCALES` are builders by name: each is called with a directory, which it makes, and leaves there
what its name says. Nothing here uses melayer: what is hostile must not come from the code under test. Every one of
them must be refused by what reads it, in one sentence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Builder = Callable[[Path], None]

MASK_FILE = "melayer_mask.json"
PREFIX_TENSORS, PREFIX_ABOUT = "prefix.safetensors", "prefix.json"
SCALES_TENSORS, SCALES_ABOUT = "scales.safetensors", "scales.json"

DEEP = "[" * 100_000 + "]" * 100_000


def mask(**changes: Any) -> dict[str, Any]:
    """A good mask for the toy Llama (8 blocks, d_model 64), but for these fields."""
    good: dict[str, Any] = {
        "version": 1, "rate": 0.5, "strength": 1.0, "selector": "random", "layers": [4, 5], "positions": "first",
        "seed": 0, "dims": None, "me_layer": 3, "massive_above": 1000.0, "made_for": None, "by_layer": None,
    }  # fmt: skip
    return {**good, **changes}


def made_for(**changes: Any) -> dict[str, Any]:
    """A good `made_for`, but for these fields."""
    return {"family": "llama", "n_layers": 8, "d_model": 64, "fingerprint": "0" * 16, **changes}


def _json(name: str, value: Any) -> Builder:
    return lambda path: _write(path, name, json.dumps(value).encode())


def _bytes(name: str, content: bytes) -> Builder:
    return lambda path: _write(path, name, content)


def _write(path: Path, name: str, content: bytes) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)


def _directory(name: str) -> Builder:
    return lambda path: (path / name).mkdir(parents=True)


def _link(name: str, to: str) -> Builder:
    def build(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / name).symlink_to(to)

    return build


def _pipe(name: str) -> Builder:
    def build(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path / name)

    return build


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


FIELDS: dict[str, dict[str, Any]] = {
    "dims is text": {"selector": "dims", "dims": "12"},
    "dims holds text": {"selector": "dims", "dims": ["1", "2"]},
    "dims holds floats": {"selector": "dims", "dims": [1.0, 2.5]},
    "dims holds true": {"selector": "dims", "dims": [True, 2]},
    "dims is a number": {"selector": "dims", "dims": 12},
    "dims is an object": {"selector": "dims", "dims": {"1": 2}},
    "dims is nested": {"selector": "dims", "dims": [[1], [2]]},
    "dims is negative": {"selector": "dims", "dims": [-1]},
    "dims twice": {"selector": "dims", "dims": [3, 3]},
    "dims beyond any model": {"selector": "dims", "dims": [10**30]},
    "dims empty with another selector": {"dims": []},
    "dims with another selector": {"dims": [1]},
    "selector dims without dims": {"selector": "dims"},
    "layers is text": {"layers": "45"},
    "layers holds text": {"layers": ["4"]},
    "layers holds floats": {"layers": [4.0]},
    "layers holds true": {"layers": [True]},
    "layers is a number": {"layers": 4},
    "layers is negative": {"layers": [-1]},
    "layers twice": {"layers": [4, 4]},
    "layers beyond any model": {"layers": [10**18]},
    "rate is text": {"rate": "0.5"},
    "rate is true": {"rate": True},
    "rate is null": {"rate": None},
    "rate is a list": {"rate": [0.5]},
    "rate is too large": {"rate": 7},
    "rate is negative": {"rate": -0.5},
    "rate is huge": {"rate": 10**400},
    "strength is text": {"strength": "1"},
    "strength is false": {"strength": False},
    "strength is too large": {"strength": 1.5},
    "selector is unknown": {"selector": "best"},
    "selector is a number": {"selector": 3},
    "selector is a list": {"selector": ["weight"]},
    "positions is unknown": {"positions": "last"},
    "positions is null": {"positions": None},
    "positions massive without a bound": {"positions": "massive", "massive_above": None},
    "positions massive before the ME layer": {"positions": "massive", "layers": [1]},
    "seed is text": {"seed": "0"},
    "seed is a float": {"seed": 0.5},
    "seed is true": {"seed": True},
    "seed is negative": {"seed": -1},
    "seed is huge": {"seed": 10**60},
    "me_layer is text": {"me_layer": "3"},
    "me_layer is a float": {"me_layer": 3.0},
    "me_layer is true": {"me_layer": True},
    "me_layer is negative": {"me_layer": -1},
    "massive_above is text": {"massive_above": "1000"},
    "massive_above is true": {"massive_above": True},
    "massive_above is negative": {"massive_above": -1.0},
    "no layers and no me_layer": {"layers": None, "me_layer": None},
    "made_for is text": {"made_for": "llama"},
    "made_for is empty": {"made_for": {}},
    "made_for has a stranger": {"made_for": made_for(colour=1)},
    "made_for family is a number": {"made_for": made_for(family=3)},
    "made_for n_layers is text": {"made_for": made_for(n_layers="8")},
    "made_for n_layers is true": {"made_for": made_for(n_layers=True)},
    "made_for n_layers is negative": {"made_for": made_for(n_layers=-8)},
    "made_for d_model is a float": {"made_for": made_for(d_model=64.0)},
    "made_for fingerprint is a number": {"made_for": made_for(fingerprint=0)},
    "made_for fingerprint is a story": {"made_for": made_for(fingerprint="x" * 10_000)},
    "by_layer is text": {"by_layer": "12"},
    "by_layer holds text": {"by_layer": ["12", "34"]},
    "by_layer holds floats": {"by_layer": [[1.0], [2.0]]},
    "by_layer holds true": {"by_layer": [[True], [False]]},
    "by_layer holds a negative": {"by_layer": [[-1], [2]]},
    "by_layer holds one twice": {"by_layer": [[1, 1], [2, 3]]},
    "by_layer is too short": {"by_layer": [[1]]},
    "by_layer is too long": {"by_layer": [[1], [2], [3]]},
    "by_layer without layers": {"by_layer": [[1], [2]], "layers": None},
    "by_layer under activation": {"by_layer": [[1], [2]], "selector": "activation"},
    "by_layer with dims": {"by_layer": [[1], [2]], "selector": "dims", "dims": [1]},
    "unknown field": {"colour": 1},
    "version is text": {"version": "1"},
    "version is true": {"version": True},
    "version is a float": {"version": 1.0},
    "version is null": {"version": None},
    "version is 0": {"version": 0},
    "version is newer": {"version": 2},
}
"""What is changed in a mask so that it is none."""

_GOOD = json.dumps(mask()).encode()

MASKS: dict[str, Builder] = {
    **{name: _json(MASK_FILE, mask(**changes)) for name, changes in FIELDS.items()},
    **{f"without {name}": _json(MASK_FILE, _without(mask(), name)) for name in ("version", "layers", "rate")},
    "empty": _bytes(MASK_FILE, b""),
    "cut off": _bytes(MASK_FILE, _GOOD[: len(_GOOD) // 2]),
    "twice": _bytes(MASK_FILE, _GOOD + _GOOD),
    "a list": _json(MASK_FILE, [mask()]),
    "null": _json(MASK_FILE, None),
    "a number": _json(MASK_FILE, 1),
    "a text": _json(MASK_FILE, json.dumps(mask())),
    "deep": _bytes(MASK_FILE, DEEP.encode()),
    "deep field": _bytes(MASK_FILE, json.dumps(mask(dims=0)).replace('"dims": 0', f'"dims": {DEEP}').encode()),
    "a number of 5,000 digits": _bytes(MASK_FILE, json.dumps(mask(seed=-7)).replace("-7", "9" * 5000).encode()),
    "NaN": _bytes(MASK_FILE, json.dumps(mask(rate=float("nan"))).encode()),
    "infinity": _bytes(MASK_FILE, json.dumps(mask(massive_above=float("inf"))).encode()),
    "1e999": _bytes(MASK_FILE, json.dumps(mask(massive_above=-7)).replace("-7", "1e999").encode()),
    "invalid UTF-8": _bytes(MASK_FILE, _GOOD.replace(b"random", b"rand\xff")),
    "UTF-16": _bytes(MASK_FILE, _GOOD.decode().encode("utf-16")),
    "a lone surrogate": _json(MASK_FILE, mask(made_for=made_for(family="\ud800"))),
    "NULs": _bytes(MASK_FILE, b"\0" * 4096),
    "a directory": _directory(MASK_FILE),
    "a link to nothing": _link(MASK_FILE, "nowhere"),
    "a link to itself": _link(MASK_FILE, MASK_FILE),
    "a pipe": _pipe(MASK_FILE),
}
"""Directories whose mask must be refused."""


def prefix_about(**changes: Any) -> dict[str, Any]:
    """What is said of a good baked prefix, but for these fields."""
    good = {"version": 1, "melayer_version": "0", "ids": [1, 5, 9], "fingerprint": "0" * 16, "masked": False}
    return {**good, **changes}


def _tensors(n: int = 8, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None] = {
        f"{kind}.{layer}": torch.zeros(1, 2, 3, 16) for layer in range(n) for kind in ("keys", "values")
    }
    found |= {name.replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _prefix(about: Any = None, tensors: dict[str, torch.Tensor] | bytes | None = None) -> Builder:
    def build(path: Path) -> None:
        content = about if isinstance(about, bytes) else json.dumps(prefix_about() if about is None else about).encode()
        _write(path, PREFIX_ABOUT, content)
        if isinstance(tensors, bytes):
            _write(path, PREFIX_TENSORS, tensors)
        else:
            save_file(_tensors() if tensors is None else tensors, path / PREFIX_TENSORS)

    return build


PREFIX_FIELDS: dict[str, dict[str, Any]] = {
    "ids is text": {"ids": "159"},
    "ids holds text": {"ids": ["1", "5", "9"]},
    "ids holds floats": {"ids": [1.5, 5, 9]},
    "ids holds true": {"ids": [True, 5, 9]},
    "ids is empty": {"ids": []},
    "ids is negative": {"ids": [-1, 5, 9]},
    "ids beyond the vocabulary": {"ids": [1, 5, 10**12]},
    "ids is too long": {"ids": [1, 5, 9, 9]},
    "masked is text": {"masked": "false"},
    "masked is a number": {"masked": 0},
    "masked without a mask": {"masked": True},
    "fingerprint is a number": {"fingerprint": 0},
    "fingerprint is null": {"fingerprint": None},
    "version is text": {"version": "1"},
    "version is true": {"version": True},
    "version is newer": {"version": 2},
    "unknown field": {"colour": 1},
}

PREFIXES: dict[str, Builder] = {
    **{name: _prefix(prefix_about(**changes)) for name, changes in PREFIX_FIELDS.items()},
    **{f"without {name}": _prefix(_without(prefix_about(), name)) for name in ("version", "ids", "fingerprint")},
    "not JSON": _prefix(b"{"),
    "deep": _prefix(DEEP.encode()),
    "a list": _prefix([]),
    "invalid UTF-8": _prefix(b"\xff\xfe{}"),
    "no tensors": _prefix(tensors=b""),
    "tensors cut off": _prefix(tensors=b"\xff\0\0\0\0\0\0\0{}"),
    "tensors with a huge header": _prefix(tensors=b"\xff" * 7 + b"\x7f{}"),
    "too few blocks": _prefix(tensors=_tensors(7)),
    "too many blocks": _prefix(tensors=_tensors(9)),
    "values missing": _prefix(tensors=_tensors(values_3=None)),
    "a stranger among the tensors": _prefix(tensors=_tensors(colour=torch.zeros(1))),
    "keys of one block longer": _prefix(tensors=_tensors(keys_2=torch.zeros(1, 2, 9, 16))),
    "keys of two rows": _prefix(tensors=_tensors(keys_2=torch.zeros(2, 2, 3, 16))),
    "keys of integers": _prefix(tensors=_tensors(keys_2=torch.zeros(1, 2, 3, 16, dtype=torch.int64))),
    "keys of another width": _prefix(tensors=_tensors(keys_2=torch.zeros(1, 2, 3, 8))),
    "keys flat": _prefix(tensors=_tensors(keys_2=torch.zeros(96))),
    "keys are NaN": _prefix(tensors=_tensors(keys_2=torch.full((1, 2, 3, 16), float("nan")))),
    "a directory": _directory(PREFIX_ABOUT),
    "empty": lambda path: path.mkdir(parents=True),
}
"""Directories whose baked prefix must be refused, on the toy Llama."""


def scales_about(**changes: Any) -> dict[str, Any]:
    """What is said of good scales for one linear map, but for these fields."""
    sets = [{"key": "plain/int8/per-tensor", "treatment": "plain", "format": "int8", "granularity": "per-tensor"}]
    maps = [{"layer": 0, "name": "a", "width": 4}]
    good = {
        "version": 1, "melayer_version": "0", "model": {"fingerprint": "f00d"}, "sets": sets, "maps": maps,
    }  # fmt: skip
    return {**good, **changes}


def _scales(about: Any = None, tensors: dict[str, torch.Tensor] | bytes | None = None) -> Builder:
    def build(path: Path) -> None:
        content = about if isinstance(about, bytes) else json.dumps(scales_about() if about is None else about).encode()
        _write(path, SCALES_ABOUT, content)
        if isinstance(tensors, bytes):
            _write(path, SCALES_TENSORS, tensors)
        else:
            given = {"plain/int8/per-tensor/a": torch.tensor(0.5)} if tensors is None else tensors
            save_file(given, path / SCALES_TENSORS)

    return build


def _scale(value: torch.Tensor) -> Builder:
    return _scales(tensors={"plain/int8/per-tensor/a": value})


SCALES: dict[str, Builder] = {
    "not JSON": _scales(b"{"),
    "deep": _scales(DEEP.encode()),
    "a list": _scales([]),
    "model is text": _scales(scales_about(model="f00d")),
    "model without a fingerprint": _scales(scales_about(model={})),
    "fingerprint is a number": _scales(scales_about(model={"fingerprint": 0})),
    "without model": _scales(_without(scales_about(), "model")),
    "version is text": _scales(scales_about(version="1")),
    "version is true": _scales(scales_about(version=True)),
    "version is newer": _scales(scales_about(version=2)),
    "maps is text": _scales(scales_about(maps="a")),
    "a width is text": _scales(scales_about(maps=[{"layer": 0, "name": "a", "width": "4"}])),
    "sets is text": _scales(scales_about(sets="plain")),
    "a set of an unknown format": _scales(
        scales_about(sets=[{"key": "k", "treatment": "plain", "format": "int3", "granularity": "per-tensor"}])
    ),
    "no tensors": _scales(tensors=b""),
    "tensors cut off": _scales(tensors=b"\xff\0\0\0\0\0\0\0{}"),
    "a scale that is missing": _scales(tensors={"plain/int8/per-tensor/b": torch.tensor(0.5)}),
    "a scale that is NaN": _scale(torch.tensor(float("nan"))),
    "a scale that is infinite": _scale(torch.tensor(float("inf"))),
    "a scale that is negative": _scale(torch.tensor(-0.5)),
    "a scale of integers": _scale(torch.tensor(1)),
    "a scale of another shape": _scale(torch.ones(3)),
    "a directory": _directory(SCALES_ABOUT),
    "empty": lambda path: path.mkdir(parents=True),
}
"""Directories whose scales must be refused, for one linear input of width 4 and weights called f00d."""
