"""How often intervals of paired differences hold the true difference; prints the tables of `docs/statistics.md`.

    python tools/interval_coverage.py shares|tests|means|parts|scores [--simulations 2000] [--resamples 999] [--seed 7]

Protocol (nominal 95 %):

- `shares`: n = 50, 100, 200, 500, 1000, 2000 items that are right or wrong; 1, 2, 5, 12.5 and 30 % of them differ; the
  true difference is 0, a quarter, half and nine tenths of that. Coverage is summed over every table of wins and losses,
  so that nothing is drawn, but for the percentile bootstrap. Accepted is an interval that never covers less than 94 %
  and never errs on one side in more than 5 %; of those accepted, the one whose conclusions are those of a test that
  keeps its level.
- `tests`: the level of three McNemar tests where nothing differs truly, in the same cells, at 5, 1 and 0.25 % (which
  Holm's correction asks for). Accepted is a test that never rejects more often than it says.
- `means`: n = 5 to 2000 items of sums over parts, of six kinds (below). Accepted is the interval whose least coverage
  from n = 20 on is the largest over the kinds that are not the hard case (`lognormal`); where nothing reaches 93 %, the
  reader is told that the items are few.
- `parts`: shares of an item's parts, most of which do not differ; accepted as in `shares`, from n = 20 on.
- `scores`: a single share of an item's parts, which are alike within an item; accepted as in `shares`, from n = 20 on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from melayer.numerics.intervals import paired_share_interval, ratio_interval

Values = npt.NDArray[np.float64]
Ends = tuple[Values, Values]

Z = float(stats.norm.ppf(0.975))
SIZES = (50, 100, 200, 500, 1000, 2000)
DIFFERING = (0.01, 0.02, 0.05, 0.125, 0.3)
NET = (0.0, 0.25, 0.5, 0.9)
"""The true difference, as a share of the items that differ."""
ITEMS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
MOST_FOR_RESAMPLING = 200
"""Items; with more a resampled interval takes hours, and differs little from the others."""


def score(wins: Values, losses: Values, n: int) -> Ends:
    """Tango 1998: ours."""
    return paired_share_interval(wins, losses, n)


def wald(wins: Values, losses: Values, n: int) -> Ends:
    """The difference and its standard error as they are found."""
    found = (wins - losses) / n
    reach = Z * np.sqrt(((wins + losses) / n - found**2) / n)
    return found - reach, found + reach


def bonett_price(wins: Values, losses: Values, n: int) -> Ends:
    """Bonett & Price 2012: Wald's with one item more on each side."""
    return wald(wins + 1, losses + 1, n + 2)


def newcombe(wins: Values, losses: Values, n: int) -> Ends:
    """Newcombe 1998, method 10, where a half of the items that do not differ are right."""
    right = (n - wins - losses) / 2
    shares = [(right + count) / n for count in (wins, losses)]
    ends = []
    for share in shares:
        middle = (share + Z**2 / 2 / n) / (1 + Z**2 / n)
        reach = Z * np.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2) / (1 + Z**2 / n)
        ends.append((middle - reach, middle + reach))
    wrong = n - wins - losses - right
    sides = (right + wins) * (wrong + losses) * (right + losses) * (wrong + wins)
    product = right * wrong - wins * losses
    # With Yates' correction, where both go the same way.
    product = np.where(product > n / 2, product - n / 2, np.where(product >= 0, 0, product))
    phi = np.divide(product, np.sqrt(sides), out=np.zeros_like(product), where=sides > 0)
    (low1, high1), (low2, high2) = ends
    down = [shares[0] - low1, high2 - shares[1]]
    up = [high1 - shares[0], shares[1] - low2]
    found = shares[0] - shares[1]
    below, above = (np.sqrt(np.maximum(a**2 - 2 * phi * a * b + b**2, 0)) for a, b in (down, up))
    return found - below, found + above


SHARES: Mapping[str, Callable[[Values, Values, int], Ends]] = {
    "score (Tango)": score,
    "Newcombe 10": newcombe,
    "Bonett-Price": bonett_price,
    "Wald": wald,
}


def tables(n: int, differing: float, net: float) -> tuple[Values, Values, Values]:
    """Wins and losses of all likely tables, and the chance of each."""
    chances = [differing * (1 + net) / 2, differing * (1 - net) / 2]
    ranges = [
        np.arange(stats.binom.ppf(1e-9, n, chance), stats.binom.ppf(1 - 1e-9, n, chance) + 1) for chance in chances
    ]
    wins, losses = (found.ravel() for found in np.meshgrid(*ranges))
    possible = wins + losses <= n
    wins, losses = wins[possible], losses[possible]
    chance = stats.multinomial.pmf(np.stack([wins, losses, n - wins - losses], -1), n, [*chances, 1 - differing])
    likely = chance > 1e-12
    return wins[likely], losses[likely], chance[likely]


def bootstrapped(wins: Values, losses: Values, n: int, resamples: int, random: np.random.Generator) -> Ends:
    """The percentile interval over resampled items, table by table."""
    ends = np.empty((2, len(wins)))
    for place, (won, lost) in enumerate(zip(wins, losses, strict=True)):
        drawn = random.multinomial(n, [won / n, lost / n, 1 - (won + lost) / n], size=resamples)
        ends[:, place] = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    return ends[0], ends[1]


def share_cells(options: argparse.Namespace) -> Iterator[tuple[int, float, float, str, float, float, float, float]]:
    """n, share that differs, net, interval, and in percent: coverage, too high, too low, mean width."""
    random = np.random.default_rng(options.seed)
    for n in SIZES:
        for differing in DIFFERING:
            for net in NET:
                wins, losses, chance = tables(n, differing, net)
                found = {name: (interval(wins, losses, n), chance) for name, interval in SHARES.items()}
                # Of the likeliest tables alone, each resampled.
                drawn = random.choice(len(chance), options.simulations, p=chance / chance.sum())
                some, counts = np.unique(drawn, return_counts=True)
                ends = bootstrapped(wins[some], losses[some], n, options.resamples, random)
                found["percentile bootstrap"] = (ends, counts / counts.sum())
                truth = differing * net
                for name, ((low, high), weight) in found.items():
                    above, below = (float(weight[off].sum()) for off in (low > truth + 1e-12, high < truth - 1e-12))
                    width = float((weight * (high - low)).sum() / weight.sum())
                    covered = 1 - above - below
                    yield n, differing, net, name, 100 * covered, 100 * above, 100 * below, 100 * width


def print_shares(options: argparse.Namespace) -> None:
    """Least and mean coverage by n, the worst side, and the width; then the worst cells of each."""
    cells = list(share_cells(options))
    names = list(dict.fromkeys(cell[3] for cell in cells))
    print("| n | interval | least | mean | most on one side | mean width, points |")
    print("|---|---|---|---|---|---|")
    for n in SIZES:
        for name in names:
            some = [cell for cell in cells if (cell[0], cell[3]) == (n, name)]
            covered, side = [cell[4] for cell in some], max(max(cell[5], cell[6]) for cell in some)
            width = np.mean([cell[7] for cell in some])
            print(f"| {n} | {name} | {min(covered):.1f} | {np.mean(covered):.1f} | {side:.1f} | {width:.2f} |")
    print("\n| items that differ (expected) | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for least, most in ((0, 2), (2, 5), (5, 10), (10, 20), (20, 50), (50, 1000)):
        row = []
        for name in names:
            covered = [c[4] for c in cells if c[3] == name and least <= c[0] * c[1] < most]
            row.append(f"{min(covered):.1f} to {max(covered):.1f}")
        print(f"| {least} to {most} | " + " | ".join(row) + " |")


def print_tests(options: argparse.Namespace) -> None:
    """How often each McNemar test rejects at most where nothing differs truly, and how often it contradicts."""
    levels = (0.05, 0.01, 0.0025)
    most: dict[str, list[float]] = {name: [0.0] * len(levels) for name in ("exact", "mid-p", "asymptotic")}
    odds = dict.fromkeys(most, 0.0)
    for n in SIZES:
        for differing in DIFFERING:
            wins, losses, chance = tables(n, differing, 0)
            both, fewer = wins + losses, np.minimum(wins, losses)
            tail, point = stats.binom.cdf(fewer, both, 0.5), stats.binom.pmf(fewer, both, 0.5)
            asymptotic = np.where(both > 0, stats.chi2.sf((wins - losses) ** 2 / np.maximum(both, 1), 1), 1)
            exact = np.minimum(1, 2 * tail)
            p = {"exact": exact, "mid-p": np.where(wins == losses, 1, exact - point), "asymptotic": asymptotic}
            low, high = score(wins, losses, n)
            for name, values in p.items():
                for place, level in enumerate(levels):
                    most[name][place] = max(most[name][place], float(chance[values < level].sum()))
                apart = ((low > 0) | (high < 0)) != (values < 0.05)
                odds[name] = max(odds[name], float(chance[apart].sum()))
    print("| test | " + " | ".join(f"at {level:.2%}" for level in levels) + " | at odds with the interval |")
    print("|---|" + "---|" * (len(levels) + 1))
    for name, values in most.items():
        print(f"| {name} | " + " | ".join(f"{value:.2%}" for value in values) + f" | {odds[name]:.2%} |")


def drawn(kind: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[Values, Values, float]:
    """Values and sizes [simulations, n] of one kind, and the true ratio."""
    ones = np.ones(shape)
    if kind == "normal":
        return random.normal(0.1, 1, shape), ones, 0.1
    if kind == "heavy":  # Student's t with three degrees of freedom
        return random.standard_t(3, shape) + 0.1, ones, 0.1
    if kind == "skewed":
        return random.exponential(1, shape) - 0.9, ones, 0.1
    if kind == "lognormal":
        return random.lognormal(0, 1, shape), ones, float(np.exp(0.5))
    if kind == "lengths":  # articles, whose change and its noise grow with their length
        size = np.round(np.exp(random.normal(8, 0.8, shape))).clip(50)
        return size * random.normal(-0.02, 0.03, shape) + np.sqrt(size) * random.normal(0, 1, shape), size, -0.02
    if kind == "graded":  # scores between 0 and 1, half of which do not change
        return np.where(random.random(shape) < 0.5, 0, random.normal(0.02, 0.1, shape)), ones, 0.01
    differing = float(kind.partition(" ")[0]) / 100
    size = random.choice([1.0, 2.0, 3.0], p=[0.55, 0.3, 0.15], size=shape)  # as IFEval's instructions
    if kind.endswith("right"):
        chance = random.beta(4 * differing, 4 * (1 - differing), shape)
        return random.binomial(size.astype(int), chance).astype(float), size, differing
    amount = np.minimum(random.choice([1, 2], p=[0.8, 0.2], size=shape), size)
    sign = np.where(random.random(shape) < 0.7, 1, -1)
    truth = differing * 0.4 * (0.8 + 0.2 * (0.55 + 0.45 * 2)) / (0.55 + 0.6 + 0.45)
    return (random.random(shape) < differing) * amount * sign, size, truth


def student(value: Values, size: Values) -> tuple[float, float]:
    """Student's t of the ratio's linear part."""
    return ratio_interval(value, size) or (float(value.sum() / size.sum()),) * 2


def two_added(value: Values, size: Values) -> tuple[float, float]:
    """The same with an item added on each side, by as much as any that differs."""
    most = float(np.abs(value).max()) or float(size.mean())
    return ratio_interval(value, size, added=(most, -most)) or (-1.0, 1.0)


def one_right_one_wrong(value: Values, size: Values) -> tuple[float, float]:
    """The same for a single share: one item more that is right in all of its parts, one in none."""
    return ratio_interval(value, size, added=(float(size.mean()), 0)) or (0.0, 1.0)


def resampled(value: Values, size: Values, resamples: int, random: np.random.Generator) -> dict[str, tuple[Any, Any]]:
    """Percentile, BCa (Efron 1987) and studentised bootstrap from the same draws."""
    n = len(value)
    chosen = random.integers(n, size=(resamples, n))
    values, sizes = value[chosen], size[chosen]
    totals = sizes.sum(axis=1)
    ratios, ratio = values.sum(axis=1) / totals, value.sum() / size.sum()
    jackknife = (value.sum() - value) / (size.sum() - size)
    off = jackknife.mean() - jackknife
    skew = (off**3).sum() / max(6 * (off**2).sum() ** 1.5, 1e-300)
    below = np.clip(((ratios < ratio).mean() + (ratios <= ratio).mean()) / 2, 1e-6, 1 - 1e-6)
    shift = stats.norm.ppf(below) + np.array([-Z, Z])
    corrected = stats.norm.cdf(stats.norm.ppf(below) + shift / (1 - skew * shift))

    def error(value: Values, size: Values, ratio: Any) -> Any:
        residual = value - np.multiply(np.reshape(ratio, (-1, 1)), size)
        return np.sqrt((residual**2).sum(axis=-1) * n / (n - 1)) / size.sum(axis=-1)

    errors, own = error(values, sizes, ratios), float(error(value[None], size[None], ratio)[0])
    apart = ratios - ratio
    studentised = np.where(errors > 0, apart / np.where(errors > 0, errors, 1), np.sign(apart) * 1e9)
    low, high = np.quantile(studentised, [0.025, 0.975])
    return {
        "percentile bootstrap": tuple(np.quantile(ratios, [0.025, 0.975])),
        "BCa bootstrap": tuple(np.quantile(ratios, corrected)),
        "studentised bootstrap": (ratio - high * own, ratio - low * own),
    }


def print_means(kinds: tuple[str, ...], options: argparse.Namespace, *, parts: bool) -> None:
    """Coverage by kind and n for each interval, with how often it errs on either side."""
    names = ["t", *(["t, two added"] if parts else [])]
    names += ["percentile bootstrap", "BCa bootstrap", "studentised bootstrap"]
    print("| kind | n | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for kind in kinds:
        for n in ITEMS:
            random = np.random.default_rng([options.seed, n])
            value, size, truth = drawn(kind, (options.simulations, n), random)
            ends: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for one, sizes in zip(value, size, strict=True):
                ends["t"].append(student(one, sizes))
                if parts:
                    ends["t, two added"].append(two_added(one, sizes))
                if n <= MOST_FOR_RESAMPLING:
                    for name, found in resampled(one, sizes, options.resamples, random).items():
                        ends[name].append(found)
            print(f"| {kind} | {n} | " + " | ".join(_covered(ends[name], truth) for name in names) + " |", flush=True)


def _covered(ends: list[tuple[float, float]], truth: float) -> str:
    if not ends:
        return "-"
    low, high = np.array(ends).T
    above, below = 100 * (low > truth).mean(), 100 * (high < truth).mean()
    return f"{100 - above - below:.1f} ({above:.1f}, {below:.1f})"


def print_scores(options: argparse.Namespace) -> None:
    """Coverage of a single share of parts."""
    print("| kind | n | t | t, two added |\n|---|---|---|---|")
    for kind in ("1 % right", "5 % right", "30 % right", "60 % right", "95 % right"):
        for n in ITEMS:
            shape = (options.simulations, n)
            value, size, truth = drawn(kind, shape, np.random.default_rng([options.seed, n]))
            pairs = list(zip(value, size, strict=True))
            ends = [[student(*pair) for pair in pairs], [one_right_one_wrong(*pair) for pair in pairs]]
            print(f"| {kind} | {n} | {_covered(ends[0], truth)} | {_covered(ends[1], truth)} |")


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=["shares", "tests", "means", "parts", "scores"])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=999)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    if options.table == "shares":
        print_shares(options)
    elif options.table == "tests":
        print_tests(options)
    elif options.table == "scores":
        print_scores(options)
    elif options.table == "means":
        print_means(("normal", "heavy", "skewed", "lognormal", "lengths", "graded"), options, parts=False)
    else:
        print_means(("2 % differ", "10 % differ", "30 % differ", "graded"), options, parts=True)


if __name__ == "__main__":
    main()
