"""A sweep result at a terminal, to the letter."""

import dataclasses

import hand_made
from melayer.studies.sweep.table import show_sweep
from rendering import printed

EXPECTED = """
Without a mask the perplexity is 10.00 and the sink rate after the ME layer (block 1) 80.0%; 2 of 3
masks raise the perplexity by at most 5 %, and of these weight 0.5 leaves the fewest sinks: 40.0% at
a perplexity of 10.25 (+2.5%, 95 % interval -8.1% to +14.4%).
A note on [red]<b>:x:</b>[/].

Masks, T = 16, 4 sequences
mask   rate perplexity    change sinks after cosine    read stream
plain     -      10.00         - 40.0% 80.0% 0.9999 1.5/5.5      -
weight  0.5      10.25     +2.5% 20.0% 40.0% 0.9950 1.5/5.5      -
weight    1   1,234.50 +12245.0%  5.0% 10.0%      - 1.5/5.5      -
random  0.5      10.00      0.0% 40.0% 80.0% 0.9999 1.5/5.5      -

Against the plain model (above 0: predicted worse)
mask   rate nats a token       interval           perplexity
weight  0.5       +0.025 -0.085..+0.134        -8.1%..+14.4%
weight    1       +4.816 +4.624..+5.008 +10091.2%..+14854.0%
random  0.5       +0.000              -                    -
sinks: the share of (sequence, head) in which key 0 draws more than 0.3 of the attention, over all
blocks and over those after the ME layer (block 1). cosine: of the massive token's state between
neighbouring blocks, mean from the ME layer until it is erased. read, stream: effective rank of what
attention reads and of the residual stream after the ME layer, with the massive tokens and without.
Intervals are at 95 %, by sequence and paired with the plain model; each stands alone: of twenty one
leaves out 0 by chance. Masked blocks: all after it; strength 1. Perplexity and sinks depend on T,
so compare only the same T. [red]<b>:x:</b>[/], float32, fingerprint 0123. Blocks and keys are
0-based.
"""


def test_what_is_printed():
    assert printed(show_sweep, hand_made.swept()) == EXPECTED.strip("\n")


def test_masked_blocks_are_named():
    result = dataclasses.replace(hand_made.swept(), settings={"layers": [2, 3], "strength": 0.5}, masked=())
    text = " ".join(printed(show_sweep, result).split())
    assert "Masked blocks: 2, 3; strength 0.5." in text
    assert "no mask was measured." in text
