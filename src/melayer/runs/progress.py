"""One count of tokens over all passes of a long measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


Progress = Callable[[int, int], None]
"""Called with the tokens done and the tokens in all."""


@dataclass(eq=False)
class Bar:
    """What the passes report to, each in its own numbers.

    Example:
        >>> bar = Bar(print, 30)
        >>> first, second = bar.part(10), bar.part(20)
        >>> first(1, 2), second(1, 1)
        5 30
        30 30
        (None, None)
    """

    progress: Progress | None
    total: int
    before: int = 0

    def part(self, tokens: int) -> Callable[[int, int], None] | None:
        """What a pass that counts as so many tokens reports to."""
        if self.progress is None:
            return None
        report, start = self.progress, self.before
        self.before += tokens
        return lambda done, of: report(start + tokens * done // max(of, 1), self.total)
