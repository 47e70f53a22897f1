"""What is saved of a model with an edit at work on it brings the edit along, or it is said that it does not."""

from __future__ import annotations

import inspect
import sys
import warnings
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from melayer.errors import MelayerWarning
from melayer.interventions.apply import MaskAtWork
from melayer.interventions.at_work import AtWork
from melayer.model import hooks
from melayer.model.decoder import Decoder
from melayer.model.provenance import fingerprint

_SAVE, _UPLOAD = "save_pretrained", "_upload_modified_files"
_saving: ContextVar[bool] = ContextVar("saving", default=False)


class _Saving:
    """Stands for `save_pretrained` on a model, so that `push_to_hub` and trainers come to it, too."""

    def __init__(self, model: nn.Module, at_work: AtWork) -> None:
        self.model, self.at_work = model, at_work

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, and the edit beside the weights."""
        model: Any = self.model
        original = getattr(type(model), _SAVE)
        if not self.at_work.on:
            return original(model, save_directory, *args, **kwargs)
        given = inspect.signature(original).bind(model, save_directory, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        main = bool(given.get("is_main_process", True))
        pushed: list[Any] = []

        def upload(working_dir: Any, *rest: Any, **more: Any) -> Any:
            self.write(Path(working_dir))
            pushed.append(working_dir)
            return getattr(type(model), _UPLOAD)(model, working_dir, *rest, **more)

        push = bool(given.get("push_to_hub", False))
        if push:
            vars(model)[_UPLOAD] = upload
        token = _saving.set(True)
        try:
            result = original(model, save_directory, *args, **kwargs)
        finally:
            _saving.reset(token)
            vars(model).pop(_UPLOAD, None)
        if main and Path(save_directory).is_dir():
            if not pushed:
                self.write(Path(save_directory))
            if push and not pushed:
                warnings.warn(
                    "The weights went to the hub without the edit that is at work on the model, which is in "
                    f"{save_directory} alone. Upload its file, too.",
                    MelayerWarning,
                    stacklevel=2,
                )
        return result

    def write(self, directory: Path) -> None:
        """Writes the edit into the directory."""
        self.at_work.write_beside(directory, self.model)


def bring_along(decoder: Decoder, at_work: AtWork) -> None:
    """From here on `model.save_pretrained` writes what is at work beside the weights."""
    model: Any = decoder.model
    if isinstance(at_work, MaskAtWork):
        at_work.weights = fingerprint(model)
    if hasattr(type(model), _SAVE):
        vars(model)[_SAVE] = _Saving(model, at_work)
    hooks.put_on_state(decoder.stack, partial(_say_left_behind, at_work), at_work)


def leave_behind(model: nn.Module, at_work: AtWork) -> None:
    """The model's own `save_pretrained` again."""
    for module in model.modules():
        saving = vars(module).get(_SAVE)
        if isinstance(saving, _Saving) and saving.at_work is at_work:
            del vars(module)[_SAVE]


def _say_left_behind(at_work: AtWork, module: nn.Module, *_: Any) -> None:
    """Weights are asked for: by the `save_pretrained` of a wrapper that was put around the model later (PEFT's)?"""
    if _saving.get() or not at_work.on:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != _SAVE:
        frame = frame.f_back
    if frame is not None:
        warnings.warn(
            f"The {type(at_work.edit).__name__} at work on this model is not in what is saved here. Save it beside: "
            "WeMask.applied_to(model).save(directory).",
            MelayerWarning,
            stacklevel=2,
        )
