"""A quantisation check at a terminal, to the letter."""

import dataclasses

import hand_made
from melayer.quantisation.table import show_quant_check
from rendering import printed

EXPECTED = """
Unquantised the perplexity is 7.39; with int8 activations, one static scale a tensor, it is 20.09
untreated, 9.49 with the prefix baked; the worst site (plain) is block 0 self_attn.q_proj, off by
50.0%.
A note on [red]<b>:x:</b>[/].

Quantised activations, T = 16, 4 sequences
format scales     treatment perplexity   cost      interval error
int8   per-tensor plain          20.09 +1.000 +0.500 +1.500 50.0%
int8   per-tensor baked           9.49 +0.250             -  6.8%
int4   per-tensor plain     not finite      -             - 50.0%
int4   per-tensor baked           9.49 +0.250             -  6.8%

What baking and the mask change (below 0: given back)
format scales     what   nats a token      interval
int8   per-tensor baking       -0.750 -1.000 -0.500 gives back

Worst linear inputs
setting               input                      error
int8 per-tensor plain block 0 self_attn.q_proj   50.0%
int8 per-tensor baked block 1 [red]<b>:x:</b>[/] 12.5%
int4 per-tensor plain block 0 self_attn.q_proj   50.0%
int4 per-tensor baked block 1 [red]<b>:x:</b>[/] 12.5%
Unquantised: 7.39, under the mask 7.40. cost: mean log-loss against the unquantised model, in nats a
token, with its 95% interval by sequence; each stands alone: of twenty one leaves out 0 by chance.
error: median over the linear inputs of the relative error of ordinary tokens. Rounded is what the
linear maps of the blocks read; the head, the weights, keys and values are not. [red]<b>:x:</b>[/],
float32, fingerprint 0123. Blocks are 0-based.
"""


def test_what_is_printed():
    assert printed(show_quant_check, hand_made.quantised()) == EXPECTED.strip("\n")


def test_without_treatments_and_mask():
    result = hand_made.quantised(formats=("int8",))
    plain = dataclasses.replace(result, rows=result.rows[:1], unquantised_mask=None)
    text = " ".join(printed(show_quant_check, plain).split())
    assert "What baking and the mask change" not in text
    assert "Unquantised: 7.39. cost: mean log-loss" in text
