"""What the reader of an evaluation has to know beside its scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from melayer.evaluation.cut_off import CUT_SHARE
from melayer.evaluation.faults import left_out_note
from melayer.evaluation.result import StoredAnswer
from melayer.evaluation.settings import TaskSettings

Rows = Mapping[str, StoredAnswer]


def notes_of(task: str, about: TaskSettings, by_variant: Mapping[str, Rows]) -> Iterator[str]:
    """Sentences on a task's items that are left out, and on prompts and answers that are cut off.

    Args:
        task: The benchmark.
        about: How it was asked.
        by_variant: [variant][item] the answers.
    """
    n = len(next(iter(by_variant.values())))
    left_out = about.get("left_out") or {}
    if left_out:
        yield left_out_note(task, left_out, n + len(left_out), "cannot be asked or judged")
    for label, rows in by_variant.items():
        failed = {key: why for key, row in rows.items() if (why := row.get("failed"))}
        if failed:
            yield left_out_note(task, failed, n, f"have no score under {label}")
    lost = about.get("prompts_cut") or {}
    if lost:
        yield (
            f"{len(lost)} of {n} prompts of {task} lose their beginning, for which the model has no room (at most "
            f"{max(lost.values()):,} tokens, the first one among them). Give fewer solved examples (--fewshot) or a "
            "larger --max-length."
        )
    if about["generation"] is not None:
        yield from _cut_off(task, about["generation"].get("max_gen_toks"), by_variant)


def _cut_off(task: str, limit: int | None, by_variant: Mapping[str, Rows]) -> Iterator[str]:
    counts, much, unknown = [], False, []
    for label, rows in by_variant.items():
        known = [row["cut"] for row in rows.values() if "cut" in row]
        if len(known) < len(rows):
            unknown.append(f"{len(rows) - len(known)} under {label}")
        if known:
            cut = sum(map(bool, known))
            counts.append(f"{cut} of {len(known)} under {label}")
            much = much or cut > CUT_SHARE * len(known)
    if much:
        yield (
            f"More than {CUT_SHARE:.0%} of the answers to {task} were cut off at {limit} tokens ({', '.join(counts)}): "
            "its scores are of what came before, and can be off by as much. Raise --max-new-tokens "
            "(load_tasks(max_new_tokens=...))."
        )
    if unknown:
        said = ", ".join(unknown)
        yield f"Whether answers to {task} were cut off is not known of those that an older version kept ({said})."
