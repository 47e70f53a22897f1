"""The comparators against arithmetic, and against weights that are really changed."""

import copy
import json
import statistics
from contextlib import nullcontext

import pytest
import torch

import melayer
import toys
from masked import ME, ROWS, TEXT, close, logits, mask_of, model_of, n_hooks, padded, state
from melayer.errors import ArchitectureError, InputError, MelayerWarning
from melayer.interventions.mask import MadeFor
from melayer.model import hooks, wiring

TEXTS = [toys.text(20, x_at=0), toys.text(20, x_at=3, seed=1)]
FFN_NORMS = {
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
    "gpt_neox": "post_attention_layernorm",
}


@pytest.fixture(params=FFN_NORMS, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    """A toy whose gammas before the FFN differ too, so that flattening them changes something."""
    model = model_of(family)
    for block in toys.blocks(model):
        weight = getattr(block, FFN_NORMS[family]).weight
        weight.data += torch.linspace(-0.3, 0.3, len(weight)).roll(toys.LISTEN)
    return model


@pytest.fixture(scope="module")
def made(model):
    return all_of(model)


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
    around = comparator.apply(model) if comparator else nullcontext()
    with torch.no_grad(), around, toys.capture(toys.blocks(model)[layer]) as seen:
        model(torch.tensor([row]))
    return seen["out"][0]


def test_massive_scalars_become_what_was_asked(model, made):
    plain = out(model)
    values = [s.value for s in locate(model).massive if s.layer == ME and s.dim == 7]
    for name, value in (("zero", 0.0), ("mean", sum(values) / len(values))):
        expected = plain.clone()
        for dim, _ in made[name].values:
            expected[0, dim] = value if dim == 7 else expected[0, dim]
        assert {dim for dim, _ in made[name].values} == {7}
        torch.testing.assert_close(out(model, made[name]), expected, atol=1e-3, rtol=1e-6)
        assert torch.equal(out(model, made[name])[1:], plain[1:])


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_a_flat_gamma_is_that_of_weights_made_flat(model, family, amount):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight = getattr(toys.blocks(changed)[ME], FFN_NORMS[family]).weight
        weight += amount * (weight.mean() - weight)
    comparator = melayer.FlatGamma(ME, amount)
    torch.testing.assert_close(out(model, comparator), out(changed), atol=1e-5, rtol=1e-5)
    assert torch.equal(out(model, comparator), out(model)) == (amount == 0)
    assert torch.equal(logits(model, TEXT, comparator), logits(model, TEXT)) == (amount == 0)


def test_a_cap_is_the_norm_that_is_left(model, made):
    cap = made["cap"]
    point = wiring.read(model).blocks[ME].sites["ffn_out"]
    seen = []
    for around in (nullcontext(), cap.apply(model)):
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


def test_the_cap_is_the_median_over_the_tokens_that_are_not_massive(model, made):
    """Also where `locate` lists one scalar of many, and where the texts are not its own."""
    tokenizer, texts = toys.tokenizer(), ["X X X X X X X w1 w2 w3 w4 w5", *TEXTS]
    point = wiring.read(model).blocks[ME].sites["ffn_out"]
    for given in (TEXTS, texts):
        writes = []
        for text in given:
            ids, seen = tokenizer(text, return_tensors="pt")["input_ids"], []
            with torch.no_grad(), hooks.watch([(seen, point)], lambda into, x: into.append(x[0])):
                model(ids)
            writes += seen[0][ids[0] != toys.X]
        few = melayer.locate(model, tokenizer, texts=TEXTS, max_listed=1)
        for located in (locate(model), few):
            found = melayer.CapWrite.calibrated(model, tokenizer, located, c=2.0, texts=given).cap
            assert found == pytest.approx(2 * statistics.median(float(x.norm()) for x in writes), rel=1e-5)


def test_a_removed_neuron_is_one_whose_weights_are_gone(model, made):
    comparator = made["neurons"]
    assert comparator.neurons == (toys.NEURON + 7,)
    changed = copy.deepcopy(model)
    ((_, write),) = toys._dense_parts(toys.blocks(changed)[ME])
    with torch.no_grad():
        write[:, toys.NEURON + 7] = 0
    left = out(model, comparator)
    torch.testing.assert_close(left, out(changed), atol=1e-5, rtol=1e-5)
    assert abs(left[0, 7]) < 0.05 * abs(out(model)[0, 7])


def test_each_row_is_that_row_alone_and_cached_is_whole(model, made):
    ids, attention_mask = padded("left")
    places = (attention_mask.cumsum(1) - 1).clamp(min=0)
    for comparator in made.values():
        batch = logits(model, ids, comparator, attention_mask=attention_mask, position_ids=places)
        for place, row in enumerate(ROWS):
            close(batch[place][attention_mask[place].bool()], logits(model, row, comparator)[0])
        whole = logits(model, TEXT, comparator)
        with torch.no_grad(), comparator.apply(model):
            first = model(torch.tensor([TEXT[:5]]), use_cache=True)
            rest = model(torch.tensor([TEXT[5:]]), past_key_values=first.past_key_values)
        close(torch.cat([first.logits, rest.logits], dim=1), whole)


def test_nothing_is_left_behind_and_only_one_at_a_time(model, made):
    before, hooked, plain = state(model), n_hooks(model), logits(model, TEXT)
    for name, comparator in made.items():
        # Where the values are alike in all texts, their mean is what stands there already.
        assert name == "mean" or not torch.equal(logits(model, TEXT, comparator), plain)
        with pytest.raises(ZeroDivisionError), comparator.apply(model):
            with pytest.raises(InputError, match="is applied to this model already"), mask_of().apply(model):
                pass
            _ = 1 / 0
        assert n_hooks(model) == hooked
        with mask_of().apply(model):
            during = n_hooks(model)
            with pytest.raises(InputError, match="is applied to this model already"), comparator.apply(model):
                pass
            assert n_hooks(model) == during
        with pytest.raises(IndexError), comparator.apply(model):
            model(torch.tensor([[toys.VOCAB + 9]]))
        assert n_hooks(model) == hooked
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert torch.equal(logits(model, TEXT), plain)


def test_descriptions_are_plain_values(made):
    for comparator in [*made.values(), melayer.CapWrite(ME, float("inf"))]:
        plain = comparator.to_dict()
        assert plain["comparator"] == type(comparator).__name__
        assert json.loads(json.dumps(plain, allow_nan=False))["me_layer"] == ME
    assert melayer.RemoveNeurons(ME, [3, 1, 3]) == melayer.RemoveNeurons(ME, (3, 1))


def test_a_row_that_is_nan_does_not_stop_the_others():
    model = model_of("llama")
    comparator = melayer.FlatGamma(ME)
    rows = model.get_input_embeddings()(torch.tensor([TEXT, TEXT])).detach()
    rows[1] = float("nan")
    with torch.no_grad(), comparator.apply(model):
        close(model(inputs_embeds=rows).logits[0], model(torch.tensor([TEXT])).logits[0])


def test_a_norm_that_computes_something_else_is_refused_before_the_first_pass():
    model = model_of("llama")
    norm = toys.blocks(model)[ME].post_attention_layernorm
    plain = norm.forward
    norm.forward = lambda x: plain(x).tanh()
    hooked = n_hooks(model)
    with pytest.raises(ArchitectureError, match="does not compute gamma"), melayer.FlatGamma(ME).apply(model):
        pytest.fail("entered")
    assert n_hooks(model) == hooked
    norm.forward = plain
    with mask_of().apply(model):  # not taken
        pass


def test_other_weights_are_said():
    model, other = model_of("llama"), model_of("llama", seed=1)
    comparator = melayer.FlatGamma.from_located(locate(model))
    with pytest.warns(MelayerWarning, match=f"fingerprint {comparator.made_for.fingerprint}; these have"):
        logits(other, TEXT, comparator)
    for make in (melayer.CapWrite.calibrated, melayer.RemoveNeurons.top):
        with pytest.raises(InputError, match="The located result is of another model"):
            make(other, toys.tokenizer(), locate(model), texts=TEXTS)


def test_what_is_refused():
    model, experts = model_of("llama"), model_of("qwen3_moe")
    located = locate(model)
    nothing = melayer.locate(toys.make("llama"), toys.tokenizer(), texts=[toys.text(20, x_at=None)])
    other = MadeFor("qwen2", 24, 896, "0" * 16)
    tokenizer, nan = toys.tokenizer(), float("nan")

    def under_another():
        with melayer.FlatGamma(ME).apply(model):
            melayer.CapWrite.calibrated(model, tokenizer, located, texts=TEXTS)

    cases = {
        "locate found no ME layer": lambda: melayer.SetMassive.from_located(nothing),
        "to is 'one'; expected zero or mean": lambda: melayer.SetMassive.from_located(located, to="one"),
        "amount is 2; expected a share": lambda: melayer.FlatGamma(ME, 2),
        "cap is -1; expected a norm": lambda: melayer.CapWrite(ME, -1),
        "c is -1; expected 0 or more": lambda: melayer.CapWrite.calibrated(model, tokenizer, located, c=-1),
        "is applied to this model already": under_another,
        "Every token of these texts is massive": lambda: melayer.CapWrite.calibrated(
            model, tokenizer, located, texts=["X X"]
        ),
        "massive_above is nan; expected a size": lambda: melayer.SetMassive(ME, nan, ((7, 0.0),)),
        "Dimension 7 was to be set to nan": lambda: melayer.SetMassive(ME, 1.0, ((7, nan),)),
        "top is 0; expected at least 1": lambda: melayer.RemoveNeurons.top(model, tokenizer, located, n=0, texts=TEXTS),
        "of block 3 are not known or belong to experts": lambda: melayer.RemoveNeurons.top(
            experts, tokenizer, locate(experts), texts=TEXTS
        ),
        "compiled code does not see hooks": lambda: logits(torch.compile(experts), TEXT, melayer.CapWrite(ME, 1.0)),
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
        return float(out(demo.model, comparator, row, layer=11)[0].abs().max())

    cap = melayer.CapWrite.calibrated(demo.model, demo.tokenizer, located, texts=texts)
    remove = melayer.RemoveNeurons.top(demo.model, demo.tokenizer, located, texts=texts)
    found = {
        "plain": left(None),
        "zero": left(melayer.SetMassive.from_located(located)),
        "mean": left(melayer.SetMassive.from_located(located, to="mean")),
        "gamma": left(melayer.FlatGamma.from_located(located)),
        "neurons": left(remove),
        "cap": left(cap),
    }
    print({name: round(value, 2) for name, value in found.items()}, remove.neurons, round(cap.cap, 3))
    assert set(remove.neurons) == {1229, 1487}
    assert found["plain"] == found["mean"] == pytest.approx(23738.13, rel=1e-4)
    assert found["gamma"] == pytest.approx(23189, rel=1e-3)
    assert found["neurons"] == pytest.approx(134, abs=1)
    # Its other large entries stand just below the threshold, and stay.
    assert found["zero"] == pytest.approx(1735.8, rel=1e-3)
    assert found["zero"] < located.massive_above
    assert found["cap"] == pytest.approx(84, abs=1)
