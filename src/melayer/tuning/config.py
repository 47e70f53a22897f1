"""The trainer's options: from a YAML file or a dict, checked by name, with what melayer decides filled in."""

from __future__ import annotations

import difflib
import json
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melayer.errors import InputError, reason
from melayer.numerics.seeds import require_seed
from melayer.runs import records
from melayer.tuning import option_values

if TYPE_CHECKING:
    from melayer.tuning.rows import Method

# Options of the trainers that something else decides, and what.
_OURS = {
    "output_dir": "it is `out` (--out)",
    "resume_from_checkpoint": "a run goes on with `resume` (--resume)",
    "overwrite_output_dir": "a directory with a finished run is never written over",
    "model_init_kwargs": "the model is loaded before: see --dtype, --device and --trust-remote-code",
    "trust_remote_code": "the model is loaded before: see --trust-remote-code",
    "do_train": "that is what the command does",
    "do_eval": "validation rows decide (--validation)",
    "do_predict": "there is nothing to predict; evaluate with `melayer eval`",
    "disable_tqdm": "the bar is melayer's",
}
# Options under which the policy would run where the mask cannot be.
_UNMASKED = {
    "use_vllm": "vLLM generates with its own copy of the model, and the mask is not in it",
    "use_transformers_paged": "paged generation packs prompts in a way that does not tell where each begins",
    "use_transformers_continuous_batching": "it packs prompts in a way that does not tell where each begins",
    "torch_compile": "compiled code does not see hooks",
}
# What depends on the place or the moment, and not on what is trained.
_ELSEWHERE = ("output_dir", "logging_dir", "run_name", "local_rank", "deepspeed_plugin", "hub_token")
_LARGEST, _DEEPEST = 2**18, 20
"""Bytes, and levels of nesting, that a file of options can have."""
STEPS_BETWEEN = 100
"""Optimiser steps between checkpoints, and between evaluations, unless told otherwise."""


def read(path: Path) -> dict[str, Any]:
    """The options in a YAML (or JSON) file.

    Raises:
        InputError: There is no such file, it is not a mapping, or it is not what a file of options needs to be.
    """
    import yaml

    todo = "Give a YAML file with --config."
    said = f"The config {path} cannot be read"
    try:
        content = records.content_of(path, said, todo)
    except FileNotFoundError as error:
        raise InputError(f"{said}: {reason(error)}. {todo}") from error
    if len(content) > _LARGEST:
        raise InputError(f"{said}: it has {len(content):,} bytes, and options take at most {_LARGEST:,}. {todo}")
    try:
        text = content.decode("utf-8-sig")
        _check_plain(path, text)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise InputError(f"The config {path} is not YAML: {first[:300]}") from error
    except (ValueError, RecursionError, OverflowError, AttributeError, TypeError) as error:
        # Dates that there are not, nesting, numbers without digits: what its constructors raise.
        raise InputError(f"{said}: {reason(error)}. {todo}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"The config {path} is a {type(values).__name__}; expected lines of the form `name: value`.")
    return values


def _check_plain(path: Path, text: str) -> None:
    """Refuses what YAML could mean beside names and values: references, which can grow without end, and names twice."""
    import yaml

    depth, names, expects_name = 0, set(), True
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"The config {path} refers to itself (*{event.anchor}). Write each value out.")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
            if depth > _DEEPEST:
                raise InputError(f"The config {path} is nested too deeply. Options are lines of the form name: value.")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if depth == 1 and isinstance(event, (yaml.ScalarEvent, yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            if expects_name and isinstance(event, yaml.ScalarEvent):
                if event.value in names:
                    raise InputError(f"The config {path} has the option {event.value!r} twice. Leave one of them out.")
                names.add(event.value)
            expects_name = not expects_name


def config_class(method: Method) -> Any:
    """TRL's class of options for a method."""
    import trl

    return {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}[method]


def check(method: Method, given: Mapping[str, Any], *, masked: bool) -> dict[str, Any]:
    """The options with numbers as numbers, if there is such an option for each and it may be set.

    Raises:
        InputError: An option is not known, is decided elsewhere, or would take the policy away from the mask.
    """
    kind = config_class(method)
    known = {item.name: item for item in fields(kind) if item.init}
    hints = typing.get_type_hints(kind)
    checked = {}
    for name, value in given.items():
        if name in _OURS:
            raise InputError(f"The option {name} cannot be set in the config: {_OURS[name]}.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"See the fields of trl.{kind.__name__}."
            raise InputError(f"{method} has no option {name!r}. {hint}")
        if masked and value and name in _UNMASKED:
            raise InputError(f"{name} does not go with a mask: {_UNMASKED[name]}. Leave it out, or the mask.")
        if method == "dpo" and name == "padding_free" and value:
            raise InputError("This version of TRL pads in DPO whatever padding_free says. Leave it out.")
        annotation = str(known[name].type)
        if isinstance(value, str) and "float" in annotation and "str" not in annotation:
            try:
                value = float(value)  # YAML reads 2e-5 as text: a number needs a point there
            except ValueError as error:
                raise InputError(f"The option {name} is {option_values.shown(value)}; expected a number.") from error
        option_values.check(method, name, value, hints[name])
        checked[name] = value
    return checked


def resolve(
    method: Method, given: Mapping[str, Any], *, out: Path, seed: int, validates: bool, max_positions: int | None
) -> Any:
    """The trainer's whole config: what was given, what melayer decides, and TRL's defaults for the rest.

    Args:
        method: Which trainer.
        given: Checked options.
        out: The directory of the run.
        seed: Of everything random, unless `given` says otherwise.
        validates: Whether there are validation rows.
        max_positions: Positions that the model has, for the default of max_length.

    Raises:
        InputError: The trainer refuses a value.
    """
    import torch

    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    ours: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STEPS_BETWEEN,
        "save_total_limit": 2,
        "seed": seed,
        # Of whatever a trainer may load by a name: a reference, a reward model.
        "trust_remote_code": False,
        # A NaN is to stop the run, not to be averaged away.
        "logging_nan_inf_filter": False,
    }
    if validates:
        ours |= {"eval_strategy": "steps", "eval_steps": STEPS_BETWEEN, "eval_on_start": True}
    if on_cpu:
        ours |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    kind = config_class(method)
    if method == "grpo":
        ours |= _grpo_defaults(given, kind)
    elif max_positions is not None:
        default: Any = next(item.default for item in fields(kind) if item.name == "max_length")
        # Rows that are too long are left out before, and TRL insists on None where nothing is padded.
        alone = method == "sft" and given.get("padding_free") and not given.get("packing")
        ours["max_length"] = None if alone else min(default or max_positions, max_positions)
    values = {**ours, **given}
    require_seed(values["seed"])
    try:
        with quiet():
            return kind(**values, output_dir=str(out), disable_tqdm=True)
    except Exception as error:
        raise InputError(f"The trainer refuses its options: {reason(error)}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """What the libraries have to say to each other about renamed options is kept from the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate)\b")
        yield


def _grpo_defaults(given: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Batches that hold whole groups of completions."""
    defaults = {item.name: item.default for item in fields(kind)}
    group = given.get("num_generations") or defaults["num_generations"]
    size = given.get("per_device_train_batch_size") or group
    return {
        # Without it there is no KL, and nothing holds the policy to where it began.
        "beta": 0.04,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": given.get("num_generations_eval") or group,
    }


def recorded(config: Any) -> dict[str, Any]:
    """The options as plain values, without those that depend on the place."""
    values = {key: value for key, value in config.to_dict().items() if key not in _ELSEWHERE}
    return {key: _plain(value) for key, value in sorted(values.items())}


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
