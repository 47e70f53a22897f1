"""Results as tables for a person at a terminal."""

from melayer.terminal.answers import live_answers, show_answers
from melayer.terminal.contrast import show_contrast
from melayer.terminal.evaluate import show_eval
from melayer.terminal.explain import show_explain
from melayer.terminal.locate import show_locate
from melayer.terminal.quant_check import show_quant_check
from melayer.terminal.rigidity import show_rigidity
from melayer.terminal.scan import show_scan
from melayer.terminal.sinks import show_sinks
from melayer.terminal.sweep import show_sweep
from melayer.terminal.tune import show_tune

__all__ = [
    "live_answers",
    "show_answers",
    "show_contrast",
    "show_eval",
    "show_explain",
    "show_locate",
    "show_quant_check",
    "show_rigidity",
    "show_scan",
    "show_sinks",
    "show_sweep",
    "show_tune",
]
