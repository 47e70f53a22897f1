"""The same measurements on two models, side by side: did the ME layer move, did the sinks go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from melayer.data.texts import builtin_texts
from melayer.errors import InputError
from melayer.measurements.criterion import Criterion
from melayer.measurements.locate.locate import locate
from melayer.measurements.locate.result import LocateResult
from melayer.measurements.rigidity.result import RigidityResult
from melayer.measurements.rigidity.rigidity import rigidity
from melayer.measurements.sinks.result import SinksResult
from melayer.measurements.sinks.sinks import sinks
from melayer.runs.progress import Progress
from melayer.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from melayer.interventions.mask import WeMask


@dataclass(frozen=True)
class Measured:
    """One model's ME layer, rigidity and sinks."""

    located: LocateResult
    rigidity: RigidityResult
    sinks: SinksResult
    asked: Mapping[str, Any]
    """What the figures depend on beside the model: two models are compared under the same."""
    mask: WeMask | None
    """The mask that was applied while it was measured."""

    @property
    def largest(self) -> tuple[float | None, int | None, int | None]:
        """The largest finite |h| at a block's output, with its block and dimension."""
        rows = [(row.max_abs, row.layer, row.dim) for row in self.located.blocks if row.max_abs is not None]
        return max(rows, key=lambda row: row[0]) if rows else (None, None, None)

    def sinks_after(self, layer: int | None) -> float | None:
        """The sink rate over the blocks after one, whichever the model's own ME layer is."""
        rows = [
            (rate, len(alpha))
            for rate, alpha in list(zip(self.sinks.rate_by_layer, self.sinks.alpha, strict=True))[
                0 if layer is None else layer + 1 :
            ]
            if rate is not None and alpha is not None
        ]
        heads = sum(n for _, n in rows)
        return sum(rate * n for rate, n in rows) / heads if heads else None

    @property
    def rigid(self) -> float | None:
        """The lowest cosine between neighbouring blocks from the ME layer until the state is erased."""
        at, until = self.rigidity.me_layer, self.rigidity.rigid_until
        if at is None or until is None:
            return None
        return min((value for value in self.rigidity.cosine_next[at:until] if value is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The three results as plain values."""
        return {
            "locate": self.located.to_dict(),
            "rigidity": self.rigidity.to_dict(),
            "sinks": self.sinks.to_dict(),
            "mask": None if self.mask is None else asdict(self.mask),
        }


@dataclass(frozen=True)
class Figure:
    """One figure of both models."""

    name: str
    before: float | int | str | None
    after: float | int | str | None


@dataclass(frozen=True)
class ContrastResult:
    """Two models on the same texts. Layers are 0-based."""

    before: Measured
    after: Measured
    T: int
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values that JSON can hold; what `--json` prints."""
        return {
            "melayer_version": __version__,
            "sentence": self.sentence,
            "T": self.T,
            "figures": [asdict(figure) for figure in self.figures],
            "notes": list(self.notes),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    @property
    def sentence(self) -> str:
        """The answer in one sentence, computed from the figures."""
        first, second = self.before.located.me_layer, self.after.located.me_layer
        if first == second:
            where = "Neither model has an ME layer" if first is None else f"The ME layer is block {first} in both"
        else:
            where = f"The ME layer was {_block(first)} and is {_block(second)}"
        before, after = (side.sinks_after(first) for side in (self.before, self.after))
        if before is None or after is None:
            return f"{where}."
        over = "over all blocks" if first is None else f"after block {first}"
        same = "stayed at" if before == after else "went from"
        rates = f"{before:.1%}" if before == after else f"{before:.1%} to {after:.1%}"
        return f"{where}; the sink rate {over} {same} {rates}."


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    T: int = 64,
    epsilon: float = 0.3,
    n_first_tokens: int = 64,
    texts: Sequence[str] | None = None,
    bos: bool | None = None,
    criterion: Criterion | None = None,
    max_batch_tokens: int = 2048,
    parts: Mapping[str, str] | None = None,
    mask: WeMask | None = None,
    name: str | None = None,
    part: Callable[[int], Progress] | None = None,
) -> Measured:
    """A model's ME layer, rigidity and sinks, for `contrast`.

    Args:
        model: A causal language model from transformers. It is bit-identical afterwards.
        tokenizer: The model's.
        T: Tokens in each sequence, for the sinks.
        epsilon: A head is a sink head where key 0 draws more than this.
        n_first_tokens: How many different first tokens to compare.
        texts: What to run; by default a small varied set that melayer brings along.
        bos: Whether the begin-of-sequence token comes first; None leaves it to the tokenizer.
        criterion: What counts as massive, and as the ME layer.
        max_batch_tokens: Tokens in one forward pass.
        parts: Names of parts that `architecture.read` does not find by itself.
        mask: What is applied to the model already, to be recorded.
        name: What to call the model in the result.
        part: From the number of a measurement, 0 to 2, when it begins, to what it reports to.

    Raises:
        InputError: An option is out of range, or the texts do not make a measurement.
        ArchitectureError: A part of the model was not found.

    Example:
        >>> melayer.contrast(melayer.measure(a, tokenizer), melayer.measure(b, tokenizer)).sentence  # doctest: +SKIP
    """
    given = list(builtin_texts() if texts is None else texts)
    shared: dict[str, Any] = {"texts": texts, "bos": bos, "criterion": criterion, "parts": parts, "name": name}
    shared["max_batch_tokens"] = max_batch_tokens
    bars: Callable[[int], Progress | None] = part or (lambda _: None)
    located = locate(model, tokenizer, **shared, progress=bars(0))
    rigid = rigidity(model, tokenizer, located=located, n_first_tokens=n_first_tokens, **shared, progress=bars(1))
    drawn = sinks(model, tokenizer, T=T, epsilon=epsilon, **shared, progress=bars(2))
    asked = {
        "T": T,
        "epsilon": epsilon,
        "n_first_tokens": n_first_tokens,
        "bos": bos,
        "criterion": asdict(located.criterion),
        "texts": hashlib.sha256(json.dumps(given).encode()).hexdigest(),
    }
    return Measured(located, rigid, drawn, asked, mask)


def contrast(before: Measured, after: Measured) -> ContrastResult:
    """What differs between two models, measured alike.

    Args:
        before: What `measure` found on one.
        after: What it found on the other.

    Raises:
        InputError: They were measured under different settings.

    Example:
        >>> melayer.contrast(before, after).sentence  # doctest: +SKIP
    """
    differing = sorted(key for key in before.asked if before.asked[key] != after.asked[key])
    if differing:
        raise InputError(f"The two were measured with different {', '.join(differing)}. Measure both alike.")
    at = before.located.me_layer
    ranks = [side.rigidity.mean_rank("attn_in") for side in (before, after)]
    inputs = [
        None if side.located.me_layer is None else side.rigidity.cosine_inputs[side.located.me_layer]
        for side in (before, after)
    ]
    rows: list[tuple[str, Any, Any]] = [
        ("ME layer", before.located.me_layer, after.located.me_layer),
        ("emergence", before.located.emergence, after.located.emergence),
        ("largest |h|", before.largest[0], after.largest[0]),
        ("at block", before.largest[1], after.largest[1]),
        ("in dimension", before.largest[2], after.largest[2]),
        ("sink rate", before.sinks.rate, after.sinks.rate),
        (
            "sink rate" if at is None else f"sink rate after block {at}",
            before.sinks_after(at),
            after.sinks_after(at),
        ),
        ("lowest cosine to the next block, ME layer on", before.rigid, after.rigid),
        ("cosine across first tokens at the ME layer", inputs[0], inputs[1]),
        ("effective rank of what attention reads", ranks[0][0], ranks[1][0]),
    ]
    if at is None:
        del rows[6]
    notes = []
    for side, what in ((before, "Before"), (after, "After")):
        if side.mask is not None:
            notes.append(f"{what}: measured under its mask ({side.mask.selector} {side.mask.rate:g}).")
    notes += [
        f"{what}: {note}"
        for side, what in ((before, "Before"), (after, "After"))
        for note in dict.fromkeys([*side.located.notes, *side.rigidity.notes, *side.sinks.notes])
    ]
    return ContrastResult(
        before, after, before.sinks.T, tuple(Figure(*row) for row in rows), tuple(dict.fromkeys(notes))
    )


def _block(layer: int | None) -> str:
    return "nowhere" if layer is None else f"block {layer}"
