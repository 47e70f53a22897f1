"""A scan at a terminal, to the letter."""

import dataclasses

import hand_made
from melayer.census.table import show_scan
from rendering import printed

EXPECTED = """
Over 1,200 documents (20,000 tokens) the largest activation is |x| = 70,000.0 in block_out of block
1, at token 0 (“[red]<b>:x:</b>[/]”), dimension 5; the ME layer is block 1 (0-based); 2 values would
overflow float16.
A note on [red]<b>:x:</b>[/].

1,200 documents, 1,300 sequences, 20,000 tokens
site      block  max |x| at least token          dim 99.99 % beyond fp16
embedding     -      0.5      0.2 0:[red]<b>:x:<   5     8.0           0
block_out     1 70,000.0 35,000.0 0:[red]<b>:x:<   5     8.0           2

Category [red]<b>:x:</b>[/]: 10 documents, 11 sequences, 120 tokens
site      block  max |x| at least token          dim 99.99 % beyond fp16
embedding     -      0.5      0.2 0:[red]<b>:x:<   5     8.0           0
block_out     1 70,000.0 35,000.0 0:[red]<b>:x:<   5     8.0           2

1,300 massive tokens: 900 first in their sequence, 300 later
delimiters, 100 others
token              kind      massive first  of massive later    of
[red]<b>:x:</b>[/] delimiter           600 800           100 1,000
w                  word                  0   2             1     3

Relative error of ordinary tokens: median over blocks, and the worst block
format one scale for           site     plain  worst block masked  worst block
int8   tensor                  attn_in 50.50% 51.00%     1 50.50% 51.00%     1
int8   tensor without massive  attn_in  2.50%  3.00%     1  2.50%  3.00%     1
int8   channel                 attn_in 30.50% 31.00%     1 30.50% 31.00%     1
int8   channel without massive attn_in  4.50%  5.00%     1  4.50%  5.00%     1
int8   token                   attn_in  1.50%  2.00%     1  1.50%  2.00%     1
max |x|: over all blocks, with the block; at least: the lower end of its 95 % bootstrap interval
over documents. 99.99 %: that share of |x| in that block does not exceed it, to 1 %. beyond fp16:
values in all blocks that become infinite in float16. Sequences of at most 16 tokens.
[red]<b>:x:</b>[/], float32, fingerprint 0123. All counting is 0-based.
"""


def test_what_is_printed():
    assert printed(show_scan, hand_made.scanned()) == EXPECTED.strip("\n")


def test_nothing_massive_nothing_rounded():
    result = hand_made.scanned()
    total = dataclasses.replace(
        result.total, massive=(), n_massive_first=0, n_massive_delimiters=0, n_massive_words=0, losses=()
    )
    text = printed(show_scan, dataclasses.replace(result, total=total, categories=()))
    assert "No token is massive at any block's output." in text
    for absent in ("massive first", "Relative error", "Category"):
        assert absent not in text


def test_what_is_not_finite_is_said():
    result = hand_made.scanned()
    broken = dataclasses.replace(result.total.places[0], max_abs=None, interval=None, quantiles={"0.9999": None})
    total = dataclasses.replace(result.total, places=(broken, *result.total.places[1:]))
    lines = printed(show_scan, dataclasses.replace(result, total=total)).splitlines()
    row = next(line for line in lines if line.startswith("embedding"))
    assert row.split()[:5] == ["embedding", "-", "not", "finite", "-"]
    assert row.split()[-2:] == ["-", "0"]


def test_a_category_without_a_name():
    result = hand_made.scanned()
    nameless = dataclasses.replace(result.categories[0], name="")
    assert "Category (empty): 10 documents" in printed(show_scan, dataclasses.replace(result, categories=(nameless,)))
