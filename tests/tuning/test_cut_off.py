"""What is said of completions that were cut off."""

from melayer.tuning.cut_off import KEY, cut_off_notes
from melayer.tuning.report import CURVES


def test_above_a_share_it_is_said():
    history = [{"step": 1, KEY: 0.0}, {"step": 2, KEY: 0.5}, {"step": 2, f"eval_{KEY}": 1.0}, {"step": 3, "loss": 1.0}]
    training, validation = cut_off_notes(history, 64)
    assert training == (
        "25.0% of the completions of training were cut off at 64 tokens, and their rewards are of what came before. "
        "Raise max_completion_length (--config)."
    )
    assert validation.startswith("100.0% of the completions of validation were cut off at 64 tokens")


def test_few_are_a_curve_alone_and_other_methods_have_none():
    assert list(cut_off_notes([{"step": 1, KEY: 0.05}, {"step": 2, KEY: 0.05}], 64)) == []
    assert list(cut_off_notes([{"step": 1, "loss": 1.0}], None)) == []
    assert KEY in CURVES
