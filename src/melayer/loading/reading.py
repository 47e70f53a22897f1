"""The border to transformers: what it raises becomes one sentence, and it never asks whether it may run code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from melayer.errors import InputError, MelayerWarning, ModelError, border


def shown(name: str, *, quote: bool = True) -> str:
    """A name for a sentence: cut where it is long, and escaped where it cannot be printed."""
    short = name if len(name) <= 120 else f"{name[:120]}…"
    return repr(short) if quote or not short.isprintable() else short


@contextmanager
def reading(name: str, part: str, todo: str) -> Iterator[None]:
    """Whatever transformers raises while it reads a part of a model becomes one sentence, and its warnings are kept in.

    Args:
        name: The model's.
        part: What is read: config, weights, tokenizer.
        todo: What to do about it, a sentence.

    Raises:
        ModelError: It cannot be read, or it would run code that came with it.
    """
    with border(f"The {part} of {name} cannot be read", todo, error=ModelError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MelayerWarning)
        try:
            yield
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"{name} brings its own modelling code, which would run on this machine. If you trust its author, "
                    "pass --trust-remote-code (trust_remote_code=True)."
                ) from error
            # Of a field that is of another type than it should be, the cause says which.
            if type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
                raise ValueError(str(error.__cause__)) from error
            raise


def named(name: object) -> str:
    """What a model is called, be it given as text or as a path.

    Raises:
        InputError: It is neither.
    """
    if isinstance(name, (str, os.PathLike)) and isinstance(text := os.fspath(name), str):
        return text
    raise InputError(f"The model is {name!r}; expected its name or its path. Give e.g. 'demo'.")


def require_said(trust_remote_code: object) -> None:
    """Raises InputError unless it is True or False: None would make transformers ask, and run what a `y` allows."""
    if not isinstance(trust_remote_code, bool):
        raise InputError(f"trust_remote_code is {trust_remote_code!r}; expected True or False.")
