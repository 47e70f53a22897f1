"""Results as tables for a person at a terminal."""

from melayer.terminal.explain import show_explain
from melayer.terminal.locate import show_locate
from melayer.terminal.rigidity import show_rigidity
from melayer.terminal.sinks import show_sinks

__all__ = ["show_explain", "show_locate", "show_rigidity", "show_sinks"]
