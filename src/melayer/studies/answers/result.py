"""What `answers` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from melayer.interventions.mask import WeMask
from melayer.measurements.settings import LayerSettings
from melayer.model.provenance import ModelInfo
from melayer.version import __version__

Side = Literal["plain", "masked"]
SIDES: tuple[Side, ...] = ("plain", "masked")


class AnswersSettings(LayerSettings):
    """Of `AnswersResult.settings`."""

    max_new_tokens: int
    chat: bool
    """Whether each prompt was a user's turn under the chat template."""
    system: str | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class AnswerPair:
    """One prompt and its two answers."""

    prompt: str
    n_prompt_tokens: int
    plain: str
    masked: str
    first_difference: int | None
    """The first generated token, from 0, that differs; None where the answers are the same."""
    plain_cut: bool = False
    """Whether the plain answer ended because it was not allowed to be longer."""
    masked_cut: bool = False


@dataclass(frozen=True)
class AnswersResult:
    """What `answers` found."""

    model: ModelInfo
    settings: AnswersSettings
    mask: WeMask
    answers: tuple[AnswerPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {"melayer_version": __version__, **asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        same = sum(answer.first_difference is None for answer in self.answers)
        said = f"The mask leaves {same} of {len(self.answers)} answers as they are."
        plain, masked = (sum(getattr(answer, f"{side}_cut") for answer in self.answers) for side in SIDES)
        if plain or masked:
            said += (
                f" At {self.settings['max_new_tokens']} tokens {plain} plain and {masked} masked answers were cut off; "
                "raise --max-new-tokens (max_new_tokens=...) to see their ends."
            )
        return said
