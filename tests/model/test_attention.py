"""What keys draw, against eager attention's full matrix; and the output against the model's own."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, MambaConfig

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
        listening = attention._Listening(torch.tensor([[0, 2]]), torch.ones(1, 4, dtype=torch.bool))
        with attention._told({module: attention._Audience(0, listening)}):
            attention._attend(module, query, key, key, None, scaling=1.0, softcap=softcap)
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


@pytest.mark.parametrize("n_tokens", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, n_tokens):
    whole, half = sharp("llama"), sharp("llama").to(dtype)
    ids, mask, _ = padded(n_tokens, "none")
    try:
        half(ids, attention_mask=mask)
    except RuntimeError as error:
        # With ATEN_CPU_CAPABILITY below what the processor has, torch's own SDPA may not run on 64 tokens in bfloat16.
        if "pack_vnni2" not in str(error):
            raise
        pytest.skip(f"this model does not run here: {error}")
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
    assert not attention._audiences


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


# --- contexts in one another, and side by side ---------------------------------------------------------------------


IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))


def run(model):
    with torch.no_grad():
        model(IDS, use_cache=False)


def drawn_alone(model, key=0):
    with attention.listen(wiring.read(model), [[key]] * 2, torch.ones_like(IDS)) as drawn:
        run(model)
    return drawn()


def heads_alone(model):
    seen = []
    with attention.watch_heads(wiring.read(model), lambda layer, name, x: seen.append((layer, name, x.clone()))):
        run(model)
    return seen


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[layer], right[layer]) for layer in left)


def equal_heads(left, right):
    assert [item[:2] for item in left] == [item[:2] for item in right]
    return all(torch.equal(one[2], other[2]) for one, other in zip(left, right, strict=True))


def test_two_models_in_one_another_do_not_mix():
    models = [sharp("llama"), sharp("llama", seed=1)]
    alone = [drawn_alone(model) for model in models]
    assert not equal(*alone)
    first, second = (wiring.read(model) for model in models)
    layers, real = [], torch.ones_like(IDS)
    with (
        attention.listen(first, [[0]] * 2, real) as outer,
        attention.watch_heads(first, lambda layer, name, x: layers.append(layer)),
        attention.listen(second, [[0]] * 2, real) as inner,
    ):
        for model in models:
            run(model)
    assert equal(outer(), alone[0])
    assert equal(inner(), alone[1])
    assert len(layers) == 3 * toys.N_LAYERS  # q, k and v of the first model, and none of the second


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_contexts_on_one_model_in_one_another(implementation):
    model = sharp("llama")
    model.set_attn_implementation(implementation)
    decoder = wiring.read(model)
    expected, key_0, key_3 = heads_alone(model), drawn_alone(model, 0), drawn_alone(model, 3)
    seen = {"outer": [], "inner": []}

    def see(into):
        return lambda layer, name, x: seen[into].append((layer, name, x.clone()))

    with attention.watch_heads(decoder, see("outer")), attention.watch_heads(decoder, see("inner")):
        run(model)
    assert len(expected) == 3 * toys.N_LAYERS
    assert equal_heads(seen["outer"], expected)
    assert equal_heads(seen["inner"], expected)
    seen["outer"].clear()
    with attention.listen(decoder, [[0]] * 2, torch.ones_like(IDS)) as outer:
        run(model)
        with (
            attention.watch_heads(decoder, see("outer")),
            attention.listen(decoder, [[3]] * 2, torch.ones_like(IDS)) as inner,
        ):
            run(model)
        assert equal(outer(), key_0)
        assert equal(inner(), key_3)
        run(model)  # the outer one is heard again, and the watcher is gone
    assert [item[:2] for item in seen["outer"]] == [item[:2] for item in expected]
    assert model.config._attn_implementation == implementation
    assert not attention._audiences


def test_two_threads_with_two_models_do_not_mix():
    models = [sharp("llama"), sharp("llama", seed=1)]
    decoders, alone = [wiring.read(model) for model in models], [drawn_alone(model) for model in models]
    heads = [heads_alone(model) for model in models]
    meet = Barrier(2, timeout=60)

    def measure(place):
        seen = []
        if place:
            meet.wait()  # the second enters when the first is inside
        with (
            attention.listen(decoders[place], [[0]] * 2, torch.ones_like(IDS)) as drawn,
            attention.watch_heads(decoders[place], lambda layer, name, x: seen.append((layer, name, x.clone()))),
        ):
            if not place:
                meet.wait()
            meet.wait()  # both are inside
            run(models[place])
            meet.wait()  # and both have run when one leaves
            found = drawn()
        return found, seen

    with ThreadPoolExecutor(2) as pool:
        for place, (found, seen) in enumerate(pool.map(measure, (0, 1))):
            assert equal(found, alone[place])
            assert [item[:2] for item in seen] == [item[:2] for item in heads[place]]
            torch.testing.assert_close(seen[0][2], heads[place][0][2])


def test_the_function_is_registered_by_its_first_use(monkeypatch):
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setitem(interface._global_mapping, attention.NAME, None)
        del interface._global_mapping[attention.NAME]
    model = sharp("llama")
    wiring.read(model)
    assert attention.NAME not in AttentionInterface._global_mapping
    once, twice = drawn_alone(model), drawn_alone(model)
    assert equal(once, twice)
    assert attention.NAME in AttentionMaskInterface._global_mapping
