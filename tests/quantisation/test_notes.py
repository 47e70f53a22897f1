"""What a check's reader is told, from figures made by hand."""

from types import SimpleNamespace

from melayer.quantisation.notes import remarks
from melayer.quantisation.result import Elsewhere, Prefix

MASSIVE, ORDINARY = Prefix((3,), ("X",), (True,)), Prefix((4,), ("w4",), (False,))
NONE = {"calibration": Elsewhere(0, 70), "evaluation": Elsewhere(0, 70)}
BAKED = {"baked": SimpleNamespace(unwritable=None)}


def said(me_layer=3, prefix=MASSIVE, elsewhere=NONE, n_sequences=20, baked=BAKED):
    return list(remarks(me_layer, prefix, elsewhere, n_sequences, baked))


def test_nothing_where_all_is_well():
    assert said() == []


def test_nothing_massive_to_bake():
    assert said(me_layer=None, prefix=ORDINARY) == [
        "No ME layer was found in the calibration sequences: there is no massive token to bake."
    ]
    assert said(prefix=ORDINARY) == ["No token of the prefix is massive, so baking it takes no massive token away."]
    assert said(prefix=ORDINARY, baked={}) == []  # nothing is baked
    assert said(prefix=Prefix((4, 3), ("w4", "X"), (False, True))) == []


def test_massive_tokens_behind_the_prefix():
    elsewhere = {"calibration": Elsewhere(1, 70), "evaluation": Elsewhere(2, 1400)}
    assert said(elsewhere=elsewhere) == [
        "1 massive token of the calibration sequences, behind the prefix and so not baked, is left out of it (70 "
        "tokens in all).",
        "2 massive tokens of the evaluation sequences, behind the prefix and so not baked, saturate (1,400 tokens in "
        "all).",
    ]
    assert said(elsewhere=elsewhere, baked={}) == []


def test_few_sequences():
    assert said(n_sequences=19) == ["With 19 sequences the intervals are rough."]


def test_a_prefix_that_is_no_keys_and_values():
    baked = {"baked": SimpleNamespace(unwritable="it is a state"), **{"baked+mask": SimpleNamespace(unwritable=None)}}
    assert said(baked=baked) == ["The prefix of baked cannot be written: it is a state."]
