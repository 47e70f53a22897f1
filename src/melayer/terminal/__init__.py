"""Results as tables for a person at a terminal."""

from melayer.terminal.locate import show_locate

__all__ = ["show_locate"]
