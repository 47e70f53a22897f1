"""What an evaluation records of itself: all that its answers depend on."""

from __future__ import annotations

from typing import (
    Any,
    NotRequired,  # pydantic reads those of `typing` from Python 3.12 on
)

from typing_extensions import TypedDict


class MetricSettings(TypedDict):
    """How a metric is counted."""

    kind: str
    """`mean`, `other`, or the ratio of log-likelihoods that it is."""
    higher_is_better: bool
    primary: bool
    """Whether the benchmark is judged by it."""


class TaskSettings(TypedDict):
    """What is asked, and how."""

    lm_eval_tasks: dict[str, str]
    """lm-eval's tasks, each with its version."""
    fewshot: int
    fewshot_seed: int
    generation: dict[str, Any] | None
    """lm-eval's settings of generation; None where nothing is generated."""
    limit: int | None
    data_sha256: dict[str, str]
    cite: str
    metrics: dict[str, MetricSettings]
    left_out: NotRequired[dict[str, str] | None]
    """By item why it cannot be asked or judged; None where all can."""
    prompts_cut: NotRequired[dict[str, int] | None]
    """By item how many tokens at the prompt's beginning the model has no room for; None where all have room."""
    begins_with: NotRequired[str]
    """Where the likelihood of whole texts is asked: what each begins with."""


class SharedSettings(TypedDict, total=False):
    """What is the same for all answers; of stored runs that are compared, `runs` alone."""

    chat: bool
    system: str | None
    batch_size: int
    max_length: int | None
    model: dict[str, Any]
    """The fields of `ModelInfo`."""
    device: str
    versions: dict[str, str]
    runs: dict[str, SharedSettings]
    """By the place of each run."""


class EvalSettings(TypedDict):
    """The whole evaluation."""

    shared: SharedSettings
    tasks: dict[str, TaskSettings]
    variants: dict[str, Any]
    """By label the fields of the mask or the comparator; None for the model as it is."""
