"""The tool that the page on statistics is made with still prints that page, where nothing is drawn."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("interval_coverage", ROOT / "tools" / "interval_coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(tool, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["interval_coverage.py", *arguments])
    tool.main()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]


def figures(line):
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_the_levels_of_tests_are_those_of_the_page(tool, capsys, monkeypatch):
    for line in printed(tool, capsys, monkeypatch, "tests"):
        name = line.split("|")[1].strip()
        (on_page,) = [row for row in PAGE.splitlines() if row.startswith(f"| {name} | ") and row.count("|") == 6]
        assert figures(line) == pytest.approx(figures(on_page), abs=0.011)


def test_the_coverage_of_shares_is_that_of_the_page(tool):
    """Of n = 50 the least, and the most on one side, summed over every table: of the interval taken, and of Wald's."""
    for name in ("score (Tango)", "Wald"):
        covered, sides = [], []
        for differing in tool.DIFFERING:
            for net in tool.NET:
                wins, losses, chance = tool.tables(50, differing, net)
                low, high = tool.SHARES[name](wins, losses, 50)
                above, below = chance[low > differing * net + 1e-12].sum(), chance[high < differing * net - 1e-12].sum()
                covered.append(100 * (1 - above - below))
                sides.append(100 * max(above, below))
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| 50 | {name} | ")]
        least, _, most, _ = figures(row)
        assert (min(covered), max(sides)) == pytest.approx((least, most), abs=0.11)


def test_newcombes_interval_where_the_others_are_half_right(tool):
    """His tenth method by its definition, with Wilson's intervals from scipy."""
    from scipy.stats import binomtest

    a, b, c, d = 21, 6, 16, 21
    n = a + b + c + d
    one, two = (binomtest(k, n).proportion_ci(method="wilson") for k in (a + b, a + c))
    p, q = (a + b) / n, (a + c) / n
    corrected = max(a * d - b * c - n / 2, 0)
    phi = corrected / np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    down, up = (p - one.low, two.high - q), (one.high - p, q - two.low)
    below, above = (np.sqrt(x * x - 2 * phi * x * y + y * y) for x, y in (down, up))
    low, high = tool.newcombe(np.array([float(b)]), np.array([float(c)]), n)
    assert (low[0], high[0]) == pytest.approx((p - q - below, p - q + above))


@pytest.mark.parametrize("table", ["means", "parts", "scores"])
def test_the_simulated_tables_are_printed(tool, capsys, monkeypatch, table):
    monkeypatch.setattr(tool, "ITEMS", (5, 20))
    lines = printed(tool, capsys, monkeypatch, table, "--simulations", "8", "--resamples", "20")
    kinds = {line.split("|")[1].strip() for line in lines}
    assert all(any(row.startswith(f"| {kind} | 20 | ") for row in PAGE.splitlines()) for kind in kinds)
    assert len(lines) == 2 * len(kinds)
