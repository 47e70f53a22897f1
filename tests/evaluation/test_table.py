"""An evaluation at a terminal, to the letter."""

import dataclasses
import json

import hand_made
import stored_answers
from melayer.evaluation.select import compare_runs
from melayer.evaluation.store import FILE
from melayer.evaluation.table import show_eval
from rendering import printed

EXPECTED = """
Of 2 comparisons with plain, corrected for their number (Holm), 0 show a gain, 1 a loss
([red]<b>:x:</b>[/] on wikitext2), and 1 neither.
A note on [red]<b>:x:</b>[/].

Scores
task      metric           variant              value    interval  n   cut off
gsm8k     exact_match*     plain                50.0% 35.0%-65.0% 40 4 (10.0%)
gsm8k     exact_match*     [red]<b>:x:</b>[/]   52.5% 37.5%-67.5% 40 4 (10.0%)
wikitext2 word_perplexity* plain               7.3890           -  9         -
wikitext2 word_perplexity* [red]<b>:x:</b>[/] 12.1825           -  9         -

Against plain, in points
task      metric           variant            change     interval wins losses     p
gsm8k     exact_match*     [red]<b>:x:</b>[/]   +2.5  -5.0..+10.0    2      1     1
wikitext2 word_perplexity* [red]<b>:x:</b>[/]  -50.0 -75.0..-25.0    0      9 0.008

What follows
[red]<b>:x:</b>[/] on gsm8k: wins 2, losses 1, ties 37: no difference shown (+2.5 points, 95%
interval -5.0 to 10.0, p 1); the data rule out a gain of more than 10.0 points and a loss of more
than 5.0 points.
[red]<b>:x:</b>[/] on wikitext2: wins 0, losses 9, ties 0: a loss of 50.0 hundredths of a nat a
word, 95% interval -75.0 to -25.0.
Intervals are at 95 %: of a share of right answers Wilson's, of the difference of two Tango's score
interval, else Student's t by item. * marks what a benchmark is judged by; these comparisons are
corrected together (Holm). p: mid-p McNemar test of right and wrong, else sign flips by item.
[red]<b>:x:</b>[/], float32, fingerprint 0123, without a chat template.
"""


def test_what_is_printed():
    assert printed(show_eval, hand_made.evaluated()) == EXPECTED.strip("\n")


def test_a_chosen_variant_takes_the_place_of_what_follows():
    text = printed(show_eval, hand_made.chosen(same_items=True), width=200)
    assert "What follows" not in text
    assert (
        "Chosen\ngsm8k exact_match: [red]<b>:x:</b>[/], of 20 items (same items!); wins 2, losses 1, ties 37: no "
        "difference shown" in text
    )
    assert "of 20 items; wins 2" in printed(show_eval, hand_made.chosen(), width=200)


def test_one_variant_is_compared_with_nothing():
    text = printed(show_eval, hand_made.evaluated(compared=False))
    assert text.startswith("2 figures of one variant; nothing was compared.")
    assert "Against" not in text
    assert "What follows" not in text


def test_the_chat_template_and_stored_runs_are_said():
    result = hand_made.evaluated()
    model = result.settings["shared"]["model"]
    for shared, said in (
        ({"model": model, "chat": True}, "fingerprint 0123, with the chat template."),
        ({"runs": {"a": {}, "[/]": {}}}, "Stored runs: a, [/]."),
    ):
        stored = dataclasses.replace(result, settings={**result.settings, "shared": shared})
        assert said in " ".join(printed(show_eval, stored).split())


def test_long_names_of_stored_runs_take_no_number_from_a_comparison(tmp_path):
    metric = {"exact_match,flexible-extract": {"kind": "mean", "higher_is_better": True, "primary": True}}
    settings = stored_answers.settings({"gsm8k": metric}, ["saved mask"])
    for where, right in (("a-long-name-of-a-run", 11), ("another-long-name-of-a-run", 34)):
        (tmp_path / where).mkdir()
        rows = [
            {
                "task": "gsm8k", "variant": "saved mask", "item": f"gsm8k/{i}", "prompt": "p", "output": "",
                "scores": {"exact_match,flexible-extract": [float(i < right), 1.0]}, "tokens": 1, "seconds": 0.1,
            }
            for i in range(60)
        ]  # fmt: skip
        lines = [{"eval_of": settings}, *rows]
        (tmp_path / where / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_runs(tmp_path / "a-long-name-of-a-run", tmp_path / "another-long-name-of-a-run")
    table = printed(show_eval, found, width=80).partition("Against")[2].partition("What follows")[0]
    change = found.changes[0].comparison
    for number in ("+38.3", "23", "0", f"{change.adjusted:.3g}"):
        assert number in table.split(), (number, table)
