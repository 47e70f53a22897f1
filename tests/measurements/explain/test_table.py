"""An explain result at a terminal, to the letter."""

import dataclasses

import hand_made
from melayer.measurements.explain.table import show_explain
from rendering import printed

EXPECTED = """
Block 1: the FFN alone creates it (token 0 “[red]<b>:x:</b>[/]”, dimension 5, -2 to -4,000); of what
the block adds, without RMSNorm's gamma (flat) 97.5%, without the top two neurons -0.1% remains; of
the FFN's write: FFN alone 97.5%, RMSNorm's gamma alone 0.0%, jointly 2.5%.
A note.
Block 1: Its gamma is [red]<b>:x:</b>[/].

Block 1: powers of ten gained at each step
branch    step        massive others excess
FFN       norm          0.250 -0.500  0.750
FFN       gate and up   2.000  0.125  1.875
FFN       all           2.250 -0.375  2.625
attention values        0.500      -      -

Block 1: neurons that write
dimension 5
neuron expert share contribution
    17      2 75.0%     -3,028.5
     3 shared 20.0%       -807.6

Block 1: -2.0 to -4,000.0, and what is left of what it adds
without a part
counterfactual    value  left of the value   lowest  highest
gamma_flat_1.0 -3,900.0 97.5%        97.5%        -        -
gamma_permuted -2,000.0 50.0%        50.0% -3,000.0 -1,500.0
no_top_2            1.0 -0.1%         0.0%        -        -

Block 1: the causes in each text
text token    value FFN alone gamma post-gamma jointly cause
   0     0 -4,000.0     97.5%  0.0%          -    2.5% ffn   [red]<b>:x:</b>[/]
   1     2 -3,990.0     40.0% 10.0%          -   50.0% joint two
Budget: log10 of the norm after each step over the norm before it; others: the median of the other
tokens. [red]<b>:x:</b>[/], float32, fingerprint 0123. Blocks, tokens, dimensions and neurons are
0-based.
"""


def test_what_is_printed():
    assert printed(show_explain, hand_made.explained()) == EXPECTED.strip("\n")


def test_of_one_text_and_a_block_without_an_ffn():
    result = hand_made.explained()
    (layer,) = result.layers
    bare = dataclasses.replace(layer, texts=layer.texts[:1], neurons=(), experts=(), budget=(), notes=())
    text = printed(show_explain, dataclasses.replace(result, layers=(bare,)))
    for absent in ("the causes in each text", "neurons that write", "FFN       ", "Its gamma"):
        assert absent not in text
    assert "attention values   0.500      -      -" in text.splitlines()


def test_nothing_to_explain():
    text = printed(show_explain, dataclasses.replace(hand_made.explained(), me_layer=None, layers=()))
    assert "There is no ME layer, so there is nothing to explain" in text
    assert "Block 1" not in text
