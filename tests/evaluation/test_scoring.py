"""Figures from answers that were made by hand: each by its definition."""

import math

import pytest

from melayer.evaluation.scoring import scored, together, values_of
from melayer.numerics.paired import compare, holm, wilson
from stored_answers import answers, metric, settings


def one_task(kind, by_variant, **options):
    about = settings({"t": {"m": metric(kind, **options)}}, list(by_variant))
    return scored(about, {"t": answers("t", "m", by_variant)}, {})


def test_a_share_has_wilsons_interval():
    found = one_task("mean", {"plain": [1, 0, 1, 1], "mask": [0, 0, 1, 1]})
    plain, mask = found.scores
    share = wilson(3, 4)
    assert (plain.value, plain.low, plain.high, plain.n) == (0.75, share.low, share.high, 4)
    assert (mask.variant, mask.value) == ("mask", 0.5)
    (change,) = found.changes
    assert (change.base, change.variant) == ("plain", "mask")
    assert change.comparison == holm([compare([1, 0, 1, 1], [0, 0, 1, 1])])[0]


def test_several_parts_of_an_item_count_each():
    found = one_task("mean", {"plain": [[2.0, 2.0], [0.0, 1.0]], "mask": [[1.0, 2.0], [1.0, 1.0]]})
    assert [score.value for score in found.scores] == [2 / 3, 2 / 3]
    # Of two items little can be said: one right and one wrong in all of its parts are added.
    assert [(score.low, score.high) for score in found.scores] == [(0.0, 1.0)] * 2
    assert found.changes[0].comparison.test == "sign-flip permutation"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("word_perplexity", math.exp(30 / 10)),
        ("byte_perplexity", math.exp(30 / 10)),
        ("bits_per_byte", 30 / 10 / math.log(2)),
    ],
)
def test_ratios_of_log_likelihoods(kind, value):
    found = one_task(kind, {"plain": [[-20.0, 6.0], [-10.0, 4.0]], "mask": [[-10.0, 6.0], [-10.0, 4.0]]}, rising=False)
    score = found.scores[0]
    assert score.value == pytest.approx(value)
    assert score.low < score.value < score.high
    # What is compared is the log-likelihood, of which more is better.
    comparison = found.changes[0].comparison
    assert (comparison.difference, comparison.wins, comparison.higher_is_better) == (1.0, 1, True)


def test_what_is_no_mean_is_left_to_lm_eval():
    about = settings({"t": {"m": metric("other")}}, ["plain", "mask"])
    found = answers("t", "m", {"plain": [[1, 2], [3, 4]], "mask": [[5, 6], None]})
    result = scored(about, {"t": found}, {}, {("t", "m"): lambda values: float(sum(map(sum, values)))})
    # The item that one variant lacks counts for neither.
    assert [(score.value, score.n) for score in result.scores] == [(3.0, 1), (11.0, 1)]
    assert result.changes == ()
    assert result.notes == ("m of t is no mean over items, so its variants are not compared in pairs.",)
    # From stored answers alone it cannot be had.
    assert scored(about, {"t": found}, {}).scores == ()


def test_an_item_without_the_metric_says_nothing():
    found = one_task("mean", {"plain": [1, None, 0], "mask": [1, None, 1]})
    assert [score.n for score in found.scores] == [2, 2]
    assert found.changes[0].comparison.n == 2
    nobody = one_task("mean", {"plain": [None], "mask": [None]})
    assert (nobody.scores, nobody.changes) == ((), ())


def test_only_what_is_judged_is_corrected():
    values = {"plain": [0] * 8, "a": [1] * 8, "b": [1] * 7 + [0]}
    primary, beside = one_task("mean", values).changes, one_task("mean", values, primary=False).changes
    # All of 8 and of 7 items in one direction, half of that by mid-p, and twice for two comparisons.
    assert [change.comparison.p_holm for change in primary] == pytest.approx([2 / 2**8, 2 / 2**8])
    assert [change.comparison.p_holm for change in beside] == [None, None]
    assert [change.comparison.p for change in beside] == pytest.approx([1 / 2**8, 1 / 2**7])


def test_all_variants_are_counted_on_the_same_items():
    found = one_task("mean", {"plain": [1, None, 0, 1], "mask": [1, 1, None, 1]})
    assert [(score.variant, score.value, score.n) for score in found.scores] == [("plain", 1.0, 2), ("mask", 1.0, 2)]
    assert found.changes[0].comparison.n == 2


def test_what_has_no_score_is_named():
    about = settings({"t": {"m": metric()}}, ["plain", "mask"])
    about["tasks"]["t"]["left_out"] = {"t/7": "its answer is 9, and it has 4 choices"}
    about["tasks"]["t"]["prompts_cut"] = {"t/0": 12, "t/1": 1200}
    rows = answers("t", "m", {"plain": [1, 0, 1], "mask": [1, None, 0]})
    rows["mask"]["t/1"]["failed"] = "KeyError: 'x'"
    assert list(scored(about, {"t": rows}, {}).notes) == [
        "1 of 4 items of t left out, which cannot be asked or judged (t/7: its answer is 9, and it has 4 choices).",
        "1 of 3 items of t left out, which have no score under mask (t/1: KeyError: 'x').",
        "2 of 3 prompts of t lose their beginning, for which the model has no room (at most 1,200 tokens, the first "
        "one among them). Give fewer solved examples (--fewshot) or a larger --max-length.",
    ]


def test_a_perplexity_beyond_every_number():
    found = one_task("word_perplexity", {"plain": [[-2000.0, 2.0], [-1.0, 1.0]], "mask": [[-2.0, 2.0], [-1.0, 1.0]]})
    plain, mask = found.scores
    assert (plain.value is None, plain.shown) == (False, f"{math.exp(2001 / 3):.3e}")
    worse = one_task("word_perplexity", {"plain": [[-2000.0, 2.0], [-900.0, 1.0]]}).scores[0]
    assert (worse.value, worse.shown, worse.interval) == (None, "beyond 1e300", None)


def test_some_items():
    rows = answers("t", "m", {"plain": [1, 0, None, [3, 4]]})["plain"]
    assert values_of(rows, ["t/3", "t/2", "t/0"], "m") == [(3, 4), (1, 1)]
    assert together("mean", [(3.0, 4.0), (1.0, 1.0)]) == 0.8
    assert math.isnan(together("mean", []))
