"""The report's section on a training run: its curves, and its figures from the first step to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from melayer.presentation import figures
from melayer.presentation.figures import BLUE, VERMILLION, axis, hover, label, stroke
from melayer.presentation.numbers import number, rounded
from melayer.presentation.page import Page, Written, versions_fact, write_page
from melayer.presentation.sections import Plot, Section, Table
from melayer.tuning import cut_off
from melayer.tuning.run_directory import plain

if TYPE_CHECKING:
    from melayer.tuning.result import TuneResult


def write_tune_report(
    result: TuneResult, history: Sequence[Mapping[str, Any]], *, command: str | None = None
) -> Written:
    """Writes a training run's `report.html` and `report.json` into its directory; each appears whole or not at all.

    Args:
        result: What `sft`, `dpo` or `grpo` did.
        history: The lines of its log.
        command: The command that made it, for its provenance.

    Raises:
        OutputError: The directory cannot be written.
    """
    model, data = result.model, result.settings["data"]
    mask = "none"
    if result.mask is not None:
        layers = ", ".join(map(str, result.mask.layers or ()))
        mask = f"{result.mask.selector} {result.mask.rate:g}, strength {result.mask.strength:g}, blocks {layers}"
    facts = [
        ("Model that training began with", f"{model.name}, {model.dtype}, fingerprint {model.fingerprint}"),
        ("Mask", mask),
        ("Reference", result.reference or "none"),
        ("Trained", "a LoRA adapter" if result.adapter else "all weights"),
        ("Data", f"{data['source']}: {data['rows']} rows, sha256 {data['sha256'][:12]}"),
        versions_fact(result.versions),
    ]
    values = {"tune": plain(result.to_dict()), "log": list(history)}
    page = Page(f"{result.method} on {model.name}", [section(result, history)], result.notes, facts, values)
    return write_page(page, result.out, command=command)


# Of all that the trainers log, what says whether it works, with its words; in the order in which it is shown.
CURVES: dict[str, tuple[str, str]] = {
    "loss": ("Loss", "What training lowers, at each logged step."),
    "reward": ("Reward", "Mean over the completions of a step, all reward functions together; more is better."),
    "rewards/correctness/mean": ("Share of right answers", "Of the completions of a step."),
    "rewards/answer_format/mean": ("Share of answers in the format asked for", "Of the completions of a step."),
    "kl": ("KL to the reference", "Estimated on the completions of a step; 0 where the policy is the reference."),
    "completions/mean_length": ("Tokens of a completion", "Mean over the completions of a step."),
    cut_off.KEY: (
        "Share of completions cut off",
        "Of a step: those that were not allowed to be longer (max_completion_length). Rewards judge what came before.",
    ),
    "rewards/margins": ("Margin", "How much more the chosen answer gained on the rejected one, times beta."),
    "rewards/accuracies": ("Share of pairs in order", "Of the pairs, those whose chosen answer gained more."),
    "mean_token_accuracy": ("Share of tokens predicted", "Of the tokens that count in the loss."),
    "grad_norm": ("Norm of the gradient", "Before it is clipped."),
}


def section(result: TuneResult, history: Sequence[Mapping[str, Any]]) -> Section:
    """One plot for each curve that the method logs, and a table of some steps."""
    steps = training_steps(history)
    validation = [line for line in history if "eval_runtime" in line]
    parts: list[Plot | Table] = [
        _plot(key, steps, validation) for key in CURVES if sum(line.get(key) is not None for line in steps) > 1
    ]
    parts.append(_table(steps))
    return Section("tune", "How training went", result.sentence, parts)


def training_steps(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of a log that are of training, without those of validation."""
    return [line for line in history if not any(key.startswith("eval_") for key in line)]


def some(history: Sequence[Mapping[str, Any]], most: int = 10) -> list[Mapping[str, Any]]:
    """At most so many lines, evenly spaced, the first and the last among them."""
    if len(history) <= most:
        return list(history)
    return [history[round(place * (len(history) - 1) / (most - 1))] for place in range(most)]


def _plot(key: str, steps: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> Plot:
    title, reading = CURVES[key]
    points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
    data = [_curve("training", points, BLUE)]
    validated = [(line["step"], line[f"eval_{key}"]) for line in validation if line.get(f"eval_{key}") is not None]
    if validated:
        data.append(_curve("validation", validated, VERMILLION))
    (first, start), (last, end) = points[0], points[-1]
    return Plot(
        f"tune-{key.replace('/', '-')}",
        title,
        f"{start:.4g} at step {first}, {end:.4g} at step {last}.",
        reading,
        figures.figure(data, axis("step"), axis(label(title.lower()))),
    )


def _curve(name: str, points: Sequence[tuple[int, float]], colour: str) -> figures.Trace:
    steps, values = zip(*points, strict=True)
    return figures.line(name, steps, rounded(values, 5), stroke(colour), template=hover(f"{name}, step %{{x}}: %{{y}}"))


def _table(steps: Sequence[Mapping[str, Any]]) -> Table:
    keys = [key for key in CURVES if any(line.get(key) is not None for line in steps)]
    rows = [[line["step"], *(number(line.get(key), 4) for key in keys)] for line in some(steps)]
    return Table("Some steps", ["step", *(CURVES[key][0].lower() for key in keys)], rows)
