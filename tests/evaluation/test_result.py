"""What a result says of its figures."""

import json

from melayer.evaluation.result import Change
from melayer.evaluation.scoring import scored
from melayer.numerics.paired import compare
from melayer.version import __version__
from stored_answers import answers, metric, settings

N = 12


def result(*, rising=True):
    """One task on which `up` gains, `down` loses and `same` differs nowhere."""
    values = {"plain": [1] * 6 + [0] * 6, "up": [1] * N, "down": [0] * N, "same": [1] * 6 + [0] * 6}
    about = settings({"t": {"m": metric(rising=rising)}}, list(values))
    return scored(about, {"t": answers("t", "m", values)}, {})


def test_the_sentence_counts_what_is_shown():
    # 6 of 6 in one direction: p = 0.016, and 0.047 corrected for three.
    assert result().sentence == (
        "Of 3 comparisons with plain, corrected for their number (Holm), 1 show a gain (up on t), 1 a loss (down on "
        "t), and 1 neither."
    )
    values = {"plain": [0] * 20, "up": [1] * 20}
    both = settings({"s": {"m": metric(), "n": metric(rising=False)}, "t": {"m": metric()}}, list(values))
    of_s = answers("s", "m", values)
    for row in (row for rows in of_s.values() for row in rows.values()):
        row["scores"]["n"] = row["scores"]["m"]
    found = scored(both, {"s": of_s, "t": answers("t", "m", values)}, {})
    # Where a task is judged by two metrics, they are named.
    assert found.sentence == (
        "Of 3 comparisons with plain, corrected for their number (Holm), 2 show a gain (up on s m, up on t), 1 a loss "
        "(up on s n), and 0 neither."
    )
    assert [found.place(change) for change in found.changes] == ["s m", "s n", "t"]


def test_nothing_to_compare():
    about = settings({"t": {"m": metric()}}, ["plain"])
    found = scored(about, {"t": answers("t", "m", {"plain": [1, 0]})}, {})
    assert found.sentence == "1 figures of one variant; nothing was compared."


def test_the_items_that_flipped():
    found = result()
    up, down, same = found.changes
    assert [item for item, _, _ in found.flips(up)] == [f"t/{i}" for i in range(6, 12)]
    item, before, after = next(found.flips(down))
    assert (item, before["output"], after["output"]) == ("t/0", "plain 0", "down 0")
    assert list(found.flips(same)) == []


def test_units_of_a_change():
    comparison = compare([-100.0, -100.0, -90.0] * 4, [-90.0, -99.0, -70.0] * 4, [50] * 12)
    for kind, unit in (("mean", "points"), ("word_perplexity", "a nat a word"), ("bits_per_byte", "a nat a byte")):
        sentence = Change("t", "m", "mask", "plain", kind, True, comparison).sentence
        assert f"{unit}, 95% interval" in sentence, sentence


def test_plain_values():
    values = result().to_dict()
    assert list(values) == [
        "melayer_version", "settings", "sentence", "scores", "changes", "chosen", "notes",
    ]  # fmt: skip
    assert values["melayer_version"] == __version__
    assert values["changes"][0]["sentence"] == result().changes[0].sentence
    assert json.loads(json.dumps(values, allow_nan=False)) == json.loads(json.dumps(result().to_dict()))
