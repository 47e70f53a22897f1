"""Today's intervals and tests of the comparisons that runs recorded in results/: from counts, or from each sequence.

    python tools/recorded_intervals.py results/evaluate/ifeval.json results/quant-check/gsm8k.json

Of an evaluation, items that are right or wrong are compared anew from their wins, losses and ties; of a quantisation
check every difference, from each sequence's log-loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from melayer.numerics.paired import Difference, compare, difference, holm

UNMASKED = {"mask": "plain", "baked+mask": "baked"}


def of_evaluation(result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each comparison of right and wrong that a benchmark is judged by."""
    judged = [change for change in result["changes"] if change["primary"] and change["kind"] == "mean"]
    found = []
    for change in judged:
        counts = change["comparison"]
        wins, losses, ties = counts["wins"], counts["losses"], counts["ties"]
        rises, falls = (wins, losses) if counts["higher_is_better"] else (losses, wins)
        base, other = [0] * rises + [1] * falls + [0] * ties, [1] * rises + [0] * falls + [0] * ties
        found.append(compare(base, other, higher_is_better=counts["higher_is_better"]))
    for change, comparison in zip(judged, holm(found), strict=True):
        yield f"{change['task']} {change['metric']}, {change['variant']}: {comparison.sentence()}"


def of_quant_check(result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each difference."""
    n = result["n_predicted"] // result["n_sequences"]
    settings = {(row["format"], row["granularity"], row["treatment"]): row["score"] for row in result["rows"]}

    def line(what: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> str:
        found = difference(base["by_sequence"], other["by_sequence"], [n] * result["n_sequences"])
        return f"{what} {_shown(found)}"

    for (format, granularity, treatment), score in settings.items():
        name = f"{format} {granularity} {treatment}"
        yield line(f"{name}: cost", result["unquantised"], score)
        if treatment != "plain":
            yield line(f"{name}: against plain", settings[format, granularity, "plain"], score)
        if treatment in UNMASKED:
            yield line(f"{name}: by the mask", settings[format, granularity, UNMASKED[treatment]], score)


def _shown(found: Difference) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def main() -> None:
    """Prints the lines of each file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if "quant_check" in recorded or "unquantised" in recorded:
            lines = of_quant_check(recorded.get("quant_check", recorded))
        else:
            lines = of_evaluation(recorded.get("evaluation", recorded))
        for line in lines:
            print(f"{file.stem}: {line}")


if __name__ == "__main__":
    main()
