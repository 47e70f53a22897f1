"""A sinks result at a terminal, to the letter."""

import hand_made
from melayer.measurements.sinks.result import SinkHead
from melayer.measurements.sinks.table import show_sinks
from rendering import printed

EXPECTED = """
Over 4 sequences of T = 16 tokens, key 0 is a sink (alpha > 0.3) in 30.0% of all heads: 6.2% up to
the ME layer (block 1) and 75.0% after it.
A note on [red]<b>:x:</b>[/].

Attention on key 0, T = 16, 4 sequences
block  rate  mean highest head
    0  0.0%  9.4%   12.5%    0
    1 12.5% 25.0%   25.0%    0 <- ME layer
    2     -     -       -    - no softmax attention
    3 75.0% 68.8%   87.5%    1

Heads that are sinks in
more than half of the
sequences
block head draws sink in
    3    1 87.5%    100%
    3    0 50.0%     75%

Massive tokens: 5, 1 of them not first; sinks in 50.0% of all heads, 80.0% after the ME layer.
rate: the share of (sequence, head) in which key 0 draws more than 0.3 of the attention (mean over
the queries from there on); mean, highest: over the heads. It falls with T, so compare only the same
T. [red]<b>:x:</b>[/], float32, fingerprint 0123. Blocks, heads and keys are 0-based.
"""


def test_what_is_printed():
    assert printed(show_sinks, hand_made.sunk()) == EXPECTED.strip("\n")


def test_without_an_me_layer_sinks_or_massive_tokens():
    result = hand_made.sunk(
        me_layer=None, heads=(), massive=None, rate_by_layer=(0.0, None, None, 0.25), rate_until_me=None,
        rate_after_me=None, notes=(),
    )  # fmt: skip
    text = printed(show_sinks, result)
    assert "there is no ME layer to compare before and after." in " ".join(text.split())
    for absent in ("<- ME layer", "Heads that are sinks", "Massive tokens", "A note"):
        assert absent not in text
    assert "    1     -     -       -    - no softmax attention" in text.splitlines()


def test_of_many_heads_the_strongest_are_listed():
    heads = tuple(SinkHead(3, head, 0.9 - head / 100, 1.0) for head in range(20))
    text = printed(show_sinks, hand_made.sunk(heads=heads))
    assert "12 of 20" in " ".join(text.split())
    assert "    3   11 79.0%    100%" in text.splitlines()
    assert "    3   12 78.0%    100%" not in text.splitlines()
