"""Values of the trainers' options held to what they can be, so that nothing is refused after hours of loading."""

from __future__ import annotations

import json
import math
import typing
from typing import Any

from melayer.errors import InputError

_WHOLE_OR_SHARE = "a number above 0"
_AT_LEAST_0 = "0 or more"
BOUNDS: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0, math.inf, _AT_LEAST_0),
    "weight_decay": (0, math.inf, _AT_LEAST_0),
    "adam_epsilon": (0, math.inf, _AT_LEAST_0),
    "adam_beta1": (0, math.nextafter(1, 0), "0 or more and below 1"),
    "adam_beta2": (0, math.nextafter(1, 0), "0 or more and below 1"),
    "max_grad_norm": (0, math.inf, _AT_LEAST_0),
    "warmup_steps": (0, math.inf, _AT_LEAST_0),
    "label_smoothing_factor": (0, 1, "a share between 0 and 1"),
    "num_train_epochs": (math.nextafter(0, 1), math.inf, _WHOLE_OR_SHARE),
    "save_steps": (math.nextafter(0, 1), math.inf, _WHOLE_OR_SHARE),
    "eval_steps": (math.nextafter(0, 1), math.inf, _WHOLE_OR_SHARE),
    "logging_steps": (math.nextafter(0, 1), math.inf, _WHOLE_OR_SHARE),
    "per_device_train_batch_size": (1, 2**31 - 1, "1 or more"),
    "per_device_eval_batch_size": (1, 2**31 - 1, "1 or more"),
    "gradient_accumulation_steps": (1, 2**31 - 1, "1 or more"),
    "eval_accumulation_steps": (1, 2**31 - 1, "1 or more"),
    "save_total_limit": (1, 2**31 - 1, "1 or more"),
    "max_length": (1, 2**31 - 1, "1 or more"),
    "max_completion_length": (1, 2**31 - 1, "1 or more"),
    "num_iterations": (1, 2**31 - 1, "1 or more"),
    "num_generations": (2, 2**31 - 1, "2 or more"),
    "num_generations_eval": (1, 2**31 - 1, "1 or more"),
    "dataloader_num_workers": (0, 4096, _AT_LEAST_0),
    "seed": (0, 2**32 - 1, f"a whole number from 0 to {2**32 - 1}"),
    "data_seed": (0, 2**63 - 1, f"a whole number from 0 to {2**63 - 1}"),
    "temperature": (math.nextafter(0, 1), math.inf, "a number above 0"),
}
"""What training, or PyTorch, takes: the least, the most, and both in words."""
_CODE = ("trust_remote_code", "custom_generate")
"""Options of what is loaded or run on the way that would run code of others."""


def check(method: str, name: str, value: Any, hint: Any) -> None:
    """Holds one value to its type and its bounds.

    Args:
        method: Of which trainer.
        name: The option.
        value: What was given.
        hint: The type that the trainer's class of options says.

    Raises:
        InputError: It is another type, out of bounds, not finite, or would run code of others.
    """
    if value is None:
        return
    _check_type(method, name, value, hint)
    _check_code(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if name == "max_steps" and value != -1 and not 1 <= value < 2**31:
        raise InputError(f"The option max_steps is {shown(value)}; expected 1 or more, or -1 for whole epochs.")
    least, most, expected = BOUNDS.get(name, (-math.inf, math.inf, "a finite number"))
    if not least <= value <= most or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"The option {name} is {shown(value)}; expected {expected}.")


def _check_type(method: str, name: str, value: Any, hint: Any) -> None:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError

    try:
        adapter = TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        return  # a class of some library, which no file can hold
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise InputError(f"The option {name} of {method} is {shown(value)}; expected {in_words(hint)}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"The option {name} of {method} cannot be read; expected {in_words(hint)}.") from error


def _check_code(name: str, value: Any) -> None:
    """Nothing in an option that is a mapping asks for code of others to be run."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)  # the trainers read JSON there
        except (ValueError, RecursionError):
            return
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _CODE and inner:
                raise InputError(f"The option {name} asks for {key}, which runs code of others. Leave it out.")
            _check_code(name, inner)


def in_words(hint: Any) -> str:
    """A type as people say it."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    plain |= {dict: "a mapping", list: "a list"}
    if hint in plain:
        return plain[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (dict, list):
        return plain[origin]
    if origin is typing.Literal:
        return ", ".join(map(str, inner))
    if inner:
        return " or ".join(dict.fromkeys(in_words(item) for item in inner if item is not type(None)))
    return "a name" if isinstance(hint, type) else str(hint)


def shown(value: Any) -> str:
    """A value in a few characters, also one that would fill the memory."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # 5,000 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"
