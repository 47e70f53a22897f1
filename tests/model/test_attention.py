"""What keys draw, against eager attention's full matrix; and the output against the model's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import toys
from melayer.errors import ArchitectureError
from melayer.model import attention, wiring
from sharp_attention import sharp


def padded(n_tokens: int, side: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Ids, mask and the first real position of three rows of different lengths."""
    ids = torch.randint(3, 60, (3, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
    mask = torch.ones_like(ids)
    for row, length in enumerate((n_tokens, n_tokens - 5, n_tokens // 2)):
        if side == "right":
            mask[row, length:] = 0
        elif side == "left":
            mask[row, : n_tokens - length] = 0
    return ids, mask, [int(row.argmax()) for row in mask]


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("n_tokens", [64, 512])
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_alphas_and_logits_are_those_of_eager_attention(family, n_tokens, side):
    model = sharp(family)
    decoder = wiring.read(model)
    ids, mask, first = padded(n_tokens, side)
    keys = [[first[0]], [first[1], first[1] + 1], [first[2], first[2] + 9]]
    implementation = model.config._attn_implementation
    with torch.no_grad():
        own = model(ids, attention_mask=mask, use_cache=False).logits
        with attention.listen(decoder, keys, mask) as found:
            heard = model(ids, attention_mask=mask, use_cache=False).logits
        drawn = found()
        assert model.config._attn_implementation == implementation
        model.set_attn_implementation("eager")
        eager = model(ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    real = mask.bool()
    torch.testing.assert_close(heard[real], own[real], rtol=1e-4, atol=1e-4)
    softmax = [block.layer for block in decoder.blocks if block.attention is not None]
    assert sorted(drawn) == softmax
    spread = 0.0
    for layer, matrix in zip(softmax, [m for m in eager if m is not None], strict=True):
        for row, places in enumerate(keys):
            for n, key in enumerate(places):
                queries = [t for t in range(key, n_tokens) if real[row, t]]
                alpha = matrix[row][:, queries, key].mean(dim=-1)
                torch.testing.assert_close(drawn[layer][row, :, n], alpha, rtol=1e-4, atol=1e-4)
                spread = max(spread, float(alpha.max() / alpha.min().clamp(min=1e-12)))
        assert drawn[layer][0, :, 1].isnan().all()  # row 0 has one key only
    assert spread > 1.2  # the heads do differ, so that the comparison means something


def test_the_definition_by_hand():
    # One head of size 1, four tokens: q = 1 for all, k = ln(1), ln(2), ln(3), ln(4), so A[t, k] = (k+1) / sum.
    query = torch.ones(1, 1, 4, 1)
    key = torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0])).view(1, 1, 4, 1)
    by_hand_0 = (1 / 1 + 1 / 3 + 1 / 6 + 1 / 10) / 4
    by_hand_2 = (3 / 6 + 3 / 10) / 2
    module = torch.nn.Module()
    for softcap in (None, 1e6):  # the second is no cap in effect, and goes the chunked way
        listening = attention._Listening({id(module): 0}, torch.tensor([[0, 2]]), torch.ones(1, 4, dtype=torch.bool))
        attention._listening.append(listening)
        try:
            attention._attend(module, query, key, key, None, scaling=1.0, softcap=softcap)
        finally:
            attention._listening.pop()
        assert listening.drawn[0][0, 0].tolist() == pytest.approx([by_hand_0, by_hand_2], abs=1e-5)


def test_the_chunked_way_and_the_kernel_agree():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 600, 16, generator=generator)
    key, value = (torch.randn(2, 2, 600, 16, generator=generator) for _ in range(2))
    mask = torch.ones(600, 600, dtype=torch.bool).tril().triu(-99)[None, None]  # a window of 100
    for given in (None, mask):
        for a, b in zip(
            attention._flash(query, key, value, given, 0.3),
            attention._in_chunks(query, key, value, given, 0.3, None),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    whole, half = sharp("llama"), sharp("llama").to(dtype)
    ids, mask, _ = padded(64, "none")
    drawn = []
    for model in (whole, half):
        with torch.no_grad(), attention.listen(wiring.read(model), [[0]] * 3, mask) as found:
            model(ids, attention_mask=mask, use_cache=False)
        drawn.append(found()[3].float())
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0.05, atol=0.02)


def test_the_implementation_is_put_back_after_an_exception():
    model = sharp("gemma2")
    before = model.config._attn_implementation
    with (
        pytest.raises(RuntimeError, match="stop"),
        attention.listen(wiring.read(model), [[0]], torch.ones(1, 4)),
    ):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    assert attention._listening == []


def test_a_model_without_softmax_attention_is_refused():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    ).eval()
    with (
        pytest.raises(ArchitectureError, match=r"No block of this model \(mamba\) has softmax attention"),
        attention.listen(wiring.read(model), [[0]], torch.ones(1, 4)),
    ):
        pass


def test_attention_that_cannot_be_heard_is_said():
    model = sharp("llama")
    decoder = wiring.read(model)
    with torch.no_grad(), attention.listen(decoder, [[0]], torch.ones(1, 4)) as found:
        pass  # nothing ran through the interface
    with pytest.raises(ArchitectureError, match=r"attention of block 0 \(LlamaAttention\) does not go through"):
        found()


def test_a_position_bias_is_refused():
    tensor = torch.ones(1, 1, 2, 4)
    with pytest.raises(ArchitectureError, match="adds a position bias to its scores, which sinks do not know"):
        attention._attend(torch.nn.Linear(1, 1), tensor, tensor, tensor, None, position_bias=tensor)
