"""Find, explain, measure and relax massive activations in language models.

Importing the package loads neither torch nor transformers: each name is fetched when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from melayer.version import __version__

if TYPE_CHECKING:
    from melayer.answers import AnswersResult, answers
    from melayer.baked_prefix import BakedPrefix
    from melayer.comparators import CapWrite, FlatGamma, RemoveNeurons, SetMassive
    from melayer.contrast import ContrastResult, Measured, contrast, measure
    from melayer.corpus import Corpus
    from melayer.errors import (
        ArchitectureError,
        InputError,
        MelayerError,
        ModelError,
        OutputError,
        ProcessError,
        TrainingError,
    )
    from melayer.evaluate import EvalResult, compare_runs, evaluate, select
    from melayer.explain import ExplainResult, explain
    from melayer.frugal import locate_frugal
    from melayer.locate import Criterion, LocateResult, locate
    from melayer.mask import WeMask, fixed_prefix
    from melayer.models import Loaded, load
    from melayer.perplexity import PerplexityResult, perplexity
    from melayer.quant_check import quant_check
    from melayer.quant_check_result import QuantCheckResult
    from melayer.report import (
        write_contrast_report,
        write_eval_report,
        write_quant_report,
        write_report,
        write_scan_report,
        write_tune_report,
    )
    from melayer.rigidity import RigidityResult, rigidity
    from melayer.scan import scan
    from melayer.scan_result import ScanResult
    from melayer.sinks import SinksResult, sinks
    from melayer.sweep import SweepResult, sweep
    from melayer.tasks import load_tasks
    from melayer.training import TuneResult
    from melayer.tune import dpo, grpo, sft

_HOMES = {
    "load": "melayer.models",
    "Loaded": "melayer.models",
    "locate": "melayer.locate",
    "locate_frugal": "melayer.frugal",
    "LocateResult": "melayer.locate",
    "Criterion": "melayer.locate",
    "explain": "melayer.explain",
    "ExplainResult": "melayer.explain",
    "rigidity": "melayer.rigidity",
    "RigidityResult": "melayer.rigidity",
    "sinks": "melayer.sinks",
    "SinksResult": "melayer.sinks",
    "answers": "melayer.answers",
    "AnswersResult": "melayer.answers",
    "WeMask": "melayer.mask",
    "fixed_prefix": "melayer.mask",
    "CapWrite": "melayer.comparators",
    "FlatGamma": "melayer.comparators",
    "RemoveNeurons": "melayer.comparators",
    "SetMassive": "melayer.comparators",
    "perplexity": "melayer.perplexity",
    "PerplexityResult": "melayer.perplexity",
    "quant_check": "melayer.quant_check",
    "QuantCheckResult": "melayer.quant_check_result",
    "BakedPrefix": "melayer.baked_prefix",
    "sweep": "melayer.sweep",
    "SweepResult": "melayer.sweep",
    "evaluate": "melayer.evaluate",
    "select": "melayer.evaluate",
    "compare_runs": "melayer.evaluate",
    "EvalResult": "melayer.evaluate",
    "load_tasks": "melayer.tasks",
    "sft": "melayer.tune",
    "dpo": "melayer.tune",
    "grpo": "melayer.tune",
    "TuneResult": "melayer.training",
    "measure": "melayer.contrast",
    "Measured": "melayer.contrast",
    "contrast": "melayer.contrast",
    "ContrastResult": "melayer.contrast",
    "scan": "melayer.scan",
    "ScanResult": "melayer.scan_result",
    "Corpus": "melayer.corpus",
    "write_scan_report": "melayer.report",
    "write_tune_report": "melayer.report",
    "write_contrast_report": "melayer.report",
    "write_quant_report": "melayer.report",
    "write_report": "melayer.report",
    "write_eval_report": "melayer.report",
    "MelayerError": "melayer.errors",
    "ModelError": "melayer.errors",
    "ArchitectureError": "melayer.errors",
    "InputError": "melayer.errors",
    "OutputError": "melayer.errors",
    "ProcessError": "melayer.errors",
    "TrainingError": "melayer.errors",
}

__all__ = [
    "AnswersResult",
    "ArchitectureError",
    "BakedPrefix",
    "CapWrite",
    "ContrastResult",
    "Corpus",
    "Criterion",
    "EvalResult",
    "ExplainResult",
    "FlatGamma",
    "InputError",
    "Loaded",
    "LocateResult",
    "Measured",
    "MelayerError",
    "ModelError",
    "OutputError",
    "PerplexityResult",
    "ProcessError",
    "QuantCheckResult",
    "RemoveNeurons",
    "RigidityResult",
    "ScanResult",
    "SetMassive",
    "SinksResult",
    "SweepResult",
    "TrainingError",
    "TuneResult",
    "WeMask",
    "__version__",
    "answers",
    "compare_runs",
    "contrast",
    "dpo",
    "evaluate",
    "explain",
    "fixed_prefix",
    "grpo",
    "load",
    "load_tasks",
    "locate",
    "locate_frugal",
    "measure",
    "perplexity",
    "quant_check",
    "rigidity",
    "scan",
    "select",
    "sft",
    "sinks",
    "sweep",
    "write_contrast_report",
    "write_eval_report",
    "write_quant_report",
    "write_report",
    "write_scan_report",
    "write_tune_report",
]


class _Package(ModuleType):
    """A package whose functions keep their names when the modules of the same names are imported.

    Importing `melayer.locate` makes Python set the attribute `locate` of this package to that module;
    `melayer.locate` is to stay the function, whichever of the two is asked for first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'melayer' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
