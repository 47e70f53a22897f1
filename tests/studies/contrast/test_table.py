"""Two models side by side at a terminal, to the letter."""

import hand_made
from melayer.studies.contrast.table import show_contrast
from rendering import printed

EXPECTED = """
The ME layer is block 1 in both; the sink rate after block 1 went from 75.0% to 25.0%.
A note on [red]<b>:x:</b>[/].

Before and after
                        before  after
ME layer                     1      1
largest |h|              4,100  4,100
in dimension                 5      5
sink rate after block 1 0.7500 0.2500
before: [red]<b>:x:</b>[/], fingerprint 0123. after: after, fingerprint 0123. The same texts; sinks
at T = 16. Blocks and dimensions are 0-based.
"""


def test_what_is_printed():
    assert printed(show_contrast, hand_made.contrasted()) == EXPECTED.strip("\n")


def test_what_one_side_does_not_have():
    lines = printed(show_contrast, hand_made.contrasted(after_me=None)).splitlines()
    assert lines[0].startswith("The ME layer was block 1 and is nowhere;")
    assert "ME layer                     1      -" in lines
