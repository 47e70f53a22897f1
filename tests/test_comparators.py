"""The comparators against arithmetic, and against weights that are really changed."""

import copy

import pytest
import torch

import melayer
import toys
from melayer import architecture, hooks
from melayer.errors import InputError
from melayer.mask import MadeFor
from test_mask import ME, ROWS, TEXT, close, logits, mask_of, model_of, n_hooks, padded, state

TEXTS = [toys.text(20, x_at=0), toys.text(20, x_at=3, seed=1)]
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox")


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return model_of(request.param)


def locate(model):
    return melayer.locate(model, toys.tokenizer(), texts=TEXTS)


def all_of(model):
    located, tokenizer = locate(model), toys.tokenizer()
    return {
        "zero": melayer.SetMassive.from_located(located),
        "mean": melayer.SetMassive.from_located(located, to="mean"),
        "gamma": melayer.FlatGamma.from_located(located),
        "cap": melayer.CapWrite.calibrated(model, tokenizer, located, c=2.0, texts=TEXTS),
        "neurons": melayer.RemoveNeurons.top(model, tokenizer, located, n=1, texts=TEXTS),
    }


def out(model, comparator=None, row=TEXT, layer=ME):
    """A block's output [seq, d_model]; watched from inside the edit, as the next block reads it."""
    around = comparator.apply(model) if comparator else hooks.edits_paused()
    with torch.no_grad(), around, toys.capture(toys.blocks(model)[layer]) as seen:
        model(torch.tensor([row]))
    return seen["out"][0]


def test_massive_scalars_become_what_was_asked(model):
    plain, made = out(model), all_of(model)
    values = [s.value for s in locate(model).massive if s.layer == ME and s.dim == 7]
    for name, value in (("zero", 0.0), ("mean", sum(values) / len(values))):
        expected = plain.clone()
        for dim, _ in made[name].values:
            expected[0, dim] = value if dim == 7 else expected[0, dim]
        assert {dim for dim, _ in made[name].values} == {7}
        torch.testing.assert_close(out(model, made[name]), expected, atol=1e-3, rtol=1e-6)
        assert torch.equal(out(model, made[name])[1:], plain[1:])


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_a_flat_gamma_is_that_of_weights_made_flat(amount):
    model = model_of("llama")
    with torch.no_grad():
        norm = toys.blocks(model)[ME].post_attention_layernorm
        norm.weight.add_(torch.linspace(-0.3, 0.3, len(norm.weight)))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight = toys.blocks(changed)[ME].post_attention_layernorm.weight
        weight += amount * (weight.mean() - weight)
    comparator = melayer.FlatGamma(ME, amount)
    torch.testing.assert_close(out(model, comparator), out(changed), atol=1e-3, rtol=1e-5)
    if not amount:
        assert torch.equal(out(model, comparator), out(model))


def test_a_cap_is_the_norm_that_is_left(model):
    cap = all_of(model)["cap"]
    point = architecture.read(model).blocks[ME].sites["ffn_out"]
    seen = []
    for around in (hooks.edits_paused(), cap.apply(model)):
        with around, torch.no_grad(), hooks.watch([(0, point)], lambda _, x: seen.append(x[0])):
            model(torch.tensor([TEXT]))
    plain, capped = seen
    assert plain[0].norm() > 10 * cap.cap
    assert float(capped[0].norm()) == pytest.approx(cap.cap, rel=1e-5)
    torch.testing.assert_close(capped[0] / capped[0].norm(), plain[0] / plain[0].norm())
    within = plain.norm(dim=-1) <= cap.cap
    assert within[1:].sum() > 6
    assert torch.equal(capped[within], plain[within])
    assert torch.equal(logits(model, TEXT, melayer.CapWrite(ME, float("inf"))), logits(model, TEXT))


def test_a_removed_neuron_writes_nothing(model):
    located = locate(model)
    comparator = all_of(model)["neurons"]
    assert comparator.neurons == (toys.NEURON + 7,)
    why = melayer.explain(model, toys.tokenizer(), texts=TEXTS, located=located, layers=[ME]).layers[0]
    row = toys.tokenizer()(TEXTS[0])["input_ids"]
    left = out(model, comparator, row)[0, 7]
    assert float(left) == pytest.approx(why.value * (why.relative("no_top_1") or 0.0), abs=0.05)
    assert abs(left) < 0.05 * abs(why.value)


def test_each_row_is_that_row_alone_and_cached_is_whole(model):
    ids, attention_mask = padded("left")
    places = (attention_mask.cumsum(1) - 1).clamp(min=0)
    for comparator in all_of(model).values():
        batch = logits(model, ids, comparator, attention_mask=attention_mask, position_ids=places)
        for place, row in enumerate(ROWS):
            close(batch[place][attention_mask[place].bool()], logits(model, row, comparator)[0])
        whole = logits(model, TEXT, comparator)
        with torch.no_grad(), comparator.apply(model):
            first = model(torch.tensor([TEXT[:5]]), use_cache=True)
            rest = model(torch.tensor([TEXT[5:]]), past_key_values=first.past_key_values)
        close(torch.cat([first.logits, rest.logits], dim=1), whole)


def test_nothing_is_left_behind_and_only_one_at_a_time(model):
    before, hooked, plain = state(model), n_hooks(model), logits(model, TEXT)
    for name, comparator in all_of(model).items():
        # In a toy gamma may be flat, and the mean over texts what stands there already.
        assert name in ("gamma", "mean") or not torch.equal(logits(model, TEXT, comparator), plain)
        with pytest.raises(ZeroDivisionError), comparator.apply(model):
            with pytest.raises(InputError, match="is applied to this model already"), mask_of().apply(model):
                pass
            _ = 1 / 0
        assert n_hooks(model) == hooked
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert torch.equal(logits(model, TEXT), plain)


def test_what_is_refused():
    model, experts = model_of("llama"), model_of("qwen3_moe")
    located = locate(model)
    nothing = melayer.locate(toys.make("llama"), toys.tokenizer(), texts=[toys.text(20, x_at=None)])
    other = MadeFor("qwen2", 24, 896, "0" * 16)
    cases = {
        "locate found no ME layer": lambda: melayer.SetMassive.from_located(nothing),
        "to is 'one'; expected zero or mean": lambda: melayer.SetMassive.from_located(located, to="one"),
        "amount is 2; expected a share": lambda: melayer.FlatGamma(ME, 2),
        "cap is -1; expected a norm": lambda: melayer.CapWrite(ME, -1),
        "c is -1; expected 0 or more": lambda: melayer.CapWrite.calibrated(model, toys.tokenizer(), located, c=-1),
        "me_layer is 8, but the model has blocks 0 to 7": lambda: logits(model, TEXT, melayer.FlatGamma(8)),
        "Neuron 96 was given": lambda: logits(model, TEXT, melayer.RemoveNeurons(ME, (96,))),
        "Dimension 64 was given": lambda: logits(model, TEXT, melayer.SetMassive(ME, 1.0, ((64, 0.0),))),
        "made for another model: qwen2": lambda: logits(model, TEXT, melayer.FlatGamma(ME, made_for=other)),
        "has no norm before its FFN": lambda: logits(model_of("olmo2"), TEXT, melayer.FlatGamma(ME)),
        "an FFN of kind experts and so no ffn_act": lambda: logits(experts, TEXT, melayer.RemoveNeurons(ME, (1,))),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message):
            call()
    assert n_hooks(model) == n_hooks(experts) == 0


@pytest.mark.demo
def test_the_demo_model(demo):
    texts = ["My favorite color is Dark Blue. The sky is clear today."]
    located = melayer.locate(demo.model, demo.tokenizer, texts=texts)
    row = demo.tokenizer(texts[0])["input_ids"]

    def left(comparator):
        return float(out(demo.model, comparator, row, layer=11)[0, 507])

    assert left(melayer.SetMassive.from_located(located)) == 0
    assert left(melayer.SetMassive.from_located(located, to="mean")) == pytest.approx(23738.13, rel=1e-4)
    assert left(melayer.FlatGamma.from_located(located)) == pytest.approx(23189, rel=1e-3)
    remove = melayer.RemoveNeurons.top(demo.model, demo.tokenizer, located, texts=texts)
    assert set(remove.neurons) == {1229, 1487}
    assert left(remove) == pytest.approx(134, abs=1)
    cap = melayer.CapWrite.calibrated(demo.model, demo.tokenizer, located, texts=texts)
    assert abs(left(cap)) < 100
