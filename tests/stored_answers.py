"""Evaluations made by hand: the settings and answers that a run would have kept, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melayer.evaluation.store import FILE

MODEL = {"name": "toy", "fingerprint": "0" * 16, "dtype": "float32", "family": "llama", "n_layers": 8, "d_model": 64}


def metric(kind: str = "mean", *, rising: bool = True, primary: bool = True) -> dict[str, Any]:
    return {"kind": kind, "higher_is_better": rising, "primary": primary}


def settings(tasks: Mapping[str, Mapping[str, Any]], variants: Sequence[str], **shared: Any) -> dict[str, Any]:
    """Of tasks with their metrics."""
    return {
        "shared": {
            "chat": False,
            "model": MODEL,
            "batch_size": 2,
            "device": "cpu",
            "versions": {"torch": "2"},
            **shared,
        },
        "tasks": {
            name: {
                "lm_eval_tasks": {name: "1"},
                "fewshot": 0,
                "fewshot_seed": 1,
                "generation": None,
                "limit": None,
                "data_sha256": {},
                "cite": "",
                "metrics": dict(metrics),
            }
            for name, metrics in tasks.items()
        },
        "variants": dict.fromkeys(variants),
    }


def answer(task: str, variant: str, place: int, /, tokens: int = 1, prompt: str = "", **scores: Any) -> dict[str, Any]:
    """One answer; a score is a value and a size."""
    return {
        "task": task,
        "variant": variant,
        "item": f"{task}/{place}",
        "prompt": prompt or f"p{place}",
        "output": f"{variant} {place}",
        "scores": scores,
        "tokens": tokens,
        "seconds": 0.5,
    }


def answers(task: str, name: str, by_variant: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """[variant][item] with the values of one metric, of size 1 unless they are pairs; None where there is none."""
    return {
        variant: {
            f"{task}/{place}": answer(
                task,
                variant,
                place,
                **({} if value is None else {name: value if isinstance(value, list) else [value, 1]}),
            )
            for place, value in enumerate(values)
        }
        for variant, values in by_variant.items()
    }


def write(directory: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], file: str = FILE) -> Path:
    """A stored run."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / file).write_text("".join(json.dumps(line) + "\n" for line in ({"eval_of": about}, *records)))
    return directory
