"""A rigidity result at a terminal, to the letter."""

import dataclasses

import hand_made
from melayer.measurements.rigidity.table import show_rigidity
from rendering import printed

EXPECTED = """
From block 1 (the ME layer) to block 2 the massive token's cosine between neighbouring blocks is at
least 0.9999; over 8 first tokens (6 become massive) the mean pairwise cosine is 0.500 before it and
0.750 there (among the massive ones 0.990); after it the effective rank with the massive tokens is
2.5 in the residual stream (5.5 without them) and 3.1 in what attention reads (7.1 without them).
A note on [red]<b>:x:</b>[/].

Blocks
block   next   peak inputs attn + attn - out + out -
    0 0.2500 0.2500 0.5000      -      -   6.0   9.0
    1 0.9999 0.9999 0.7500    1.5    5.5   1.2   4.2 <- ME layer
    2 0.1250 1.0000 0.8000    1.2    5.2   1.0   4.0
    3      - 0.1250      -    5.0    9.0   4.0   7.0 erases
next, peak: cosine of the followed token's state with the next block's and with its peak, over 2
texts. inputs: mean pairwise cosine over 8 first tokens. attn, out: effective rank of what attention
reads and of the block's output, with (+) and without (-) the massive tokens, over 2 texts of 12
tokens (median). [red]<b>:x:</b>[/], float32, fingerprint 0123. Blocks are 0-based.
"""


def test_what_is_printed():
    assert printed(show_rigidity, hand_made.rigid()) == EXPECTED.strip("\n")


def test_with_one_first_token_and_no_ranks():
    result = dataclasses.replace(
        hand_made.rigid(), fixed_first_token=True, effective_rank=(), tokens=None, n_rank_sequences=0
    )
    text = " ".join(printed(show_rigidity, result).split())
    assert "inputs: mean pairwise cosine over one first token." in text
    assert "over 0 texts. [red]" in text
    assert "1 0.9999 0.9999 0.7500 - - - - <- ME layer" in text
