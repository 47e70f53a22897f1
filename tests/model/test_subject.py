"""What a measurement is made on is read once, and says of the model what results say."""

import functools

import pytest
import torch

import melayer
import toys
from masked import TEXT, logits, mask_of, model_of
from melayer.data.rows import encode, windows
from melayer.data.texts import builtin_texts
from melayer.errors import ArchitectureError, InputError
from melayer.interventions.baked_prefix import BakedPrefix
from melayer.interventions.comparators import FlatGamma
from melayer.model import hooks, wiring
from melayer.model.provenance import describe, fingerprint, require_same_model
from melayer.model.subject import Subject


def n_calls(model):
    """How often the first block has run, from here on."""
    calls = []
    toys.blocks(model)[0].register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def test_it_is_what_its_parts_are(tokenizer):
    model = toys.make("llama")
    subject = Subject.of(model, tokenizer, name="a name")
    assert subject.model is model
    assert subject.tokenizer is tokenizer
    assert subject.info == describe(wiring.read(model), "a name")
    assert subject.info.fingerprint == fingerprint(model)
    assert (subject.info.family, subject.info.n_layers, subject.info.d_model) == ("llama", 8, 64)


def test_parts_that_are_not_found_are_named(tokenizer):
    model = toys.make("llama")
    named = Subject.of(model, tokenizer, parts={"ffn": "mlp"})
    assert named.decoder.blocks[0].ffn.name == "mlp"
    with pytest.raises(ArchitectureError, match="has no part 'feed'"):
        Subject.of(model, tokenizer, parts={"ffn": "feed"})


def test_rows_are_those_of_the_texts_and_by_default_the_built_in_ones(tokenizer):
    subject = Subject.of(toys.make("llama", max_position_embeddings=16), tokenizer)
    texts = [toys.text(30, x_at=3), toys.text(5, x_at=None)]
    assert subject.rows(texts) == encode(tokenizer, texts, max_positions=16)
    assert [len(row) for row in subject.rows(texts)] == [16, 5]
    assert subject.rows(texts, max_tokens=4, bos=True) == encode(tokenizer, texts, max_tokens=4, bos=True)
    assert subject.rows(None) == encode(tokenizer, builtin_texts(), max_positions=16)
    assert subject.windows(texts, 8, bos=True) == windows(tokenizer, texts, 8, max_positions=16, bos=True)
    assert subject.windows(None, 8) == windows(tokenizer, builtin_texts(), 8, max_positions=16)


def test_what_is_given_its_parts_does_not_read_the_model_again(tokenizer, tmp_path):
    model = model_of("llama")
    mask = mask_of(rate=1.0)
    plain, masked = logits(model, TEXT), logits(model, TEXT, mask)
    flat = logits(model, TEXT, FlatGamma(3))
    selected, fixed = mask.selected(model), mask.fixed(model)
    subject = Subject.of(model, tokenizer)
    calls = n_calls(model)
    assert Subject.of(subject.decoder, tokenizer).info == subject.info
    assert mask.selected(subject.decoder) == selected
    assert mask.fixed(subject.decoder) == fixed
    with mask.apply(subject.decoder), torch.no_grad():
        assert calls == []
        assert torch.equal(model(torch.tensor([TEXT])).logits, masked)
        with pytest.raises(InputError, match="is applied to this model already"), FlatGamma(3).apply(subject.decoder):
            pass
    with FlatGamma(3).apply(subject.decoder), torch.no_grad():
        assert len(calls) == 1
        assert torch.equal(model(torch.tensor([TEXT])).logits, flat)
    mask.attach(subject.decoder)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([TEXT])).logits, masked)
    mask.detach(model)
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([TEXT])).logits, plain)
    calls.clear()
    baked = BakedPrefix.of(subject.decoder, TEXT[:3], mask)
    assert len(calls) == 1  # the prefix itself
    assert baked.fingerprint == subject.info.fingerprint
    baked.save(tmp_path)
    calls.clear()
    assert BakedPrefix.load(tmp_path, subject.decoder).ids == tuple(TEXT[:3])
    assert len(calls) == 1  # one token, whose keys and values have the model's form


def test_other_weights_are_another_model():
    first, second = (fingerprint(toys.make("llama", seed=seed)) for seed in (0, 1))
    require_same_model(first, fingerprint(toys.make("llama", dtype=torch.bfloat16)), "in another dtype")
    with pytest.raises(InputError, match="^These are others.$"):
        require_same_model(first, second, "These are others.")


@pytest.mark.parametrize("measure", ["locate", "explain", "rigidity", "sinks", "answers", "quant_check", "sweep"])
def test_under_autocast_nothing_is_measured_and_the_advice_works(measure, tokenizer):
    model = toys.plant(toys.make("llama"), [(3, 7, 3000.0)])
    more = {"sinks": {"T": 16}, "answers": {"mask": mask_of(rate=0.5)}}.get(measure, {})
    given = ["X w1"] if measure == "answers" else {"texts": [toys.text(40, x_at=0)]}
    positional = [given] if measure == "answers" else []
    named = {} if measure == "answers" else given
    call = functools.partial(getattr(melayer, measure), model, tokenizer, *positional, **named, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(InputError, match=r"Autocast is on: on cpu the model would compute in bfloat16"):
            call()
        if measure == "sinks":
            with torch.autocast("cpu", enabled=False):
                inside = call()
    if measure == "sinks":
        assert inside.to_dict() == call().to_dict()


def test_a_mask_applied_under_autocast_is_read_as_without(tokenizer):
    """Training applies one where autocast may be on."""
    model = model_of("llama")
    mask = mask_of(rate=0.5)
    plain = mask.selected(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mask.selected(model) == plain


def test_a_token_that_the_embedding_does_not_know_is_said_before_anything_runs(tokenizer):
    model = toys.make("llama", vocab_size=40)
    subject = Subject.of(model, tokenizer)
    subject.rows(["w1 w2 w3"])
    calls = n_calls(model)
    for ask in (lambda: subject.rows(["w1 X"]), lambda: subject.windows([toys.text(20, x_at=3)], 8)):
        with pytest.raises(InputError, match=r"Token id \d+ was given to LlamaForCausalLM, whose .* 40 rows"):
            ask()
    assert calls == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_no_pass_takes_a_token_that_the_embedding_does_not_know(family):
    model = toys.make(family)
    for ids in ([[1, 64]], [[-1, 2]]):
        with hooks.measuring(model), pytest.raises(InputError, match="whose embedding has 64 rows"):
            model(torch.tensor(ids))
        with hooks.known_ids(model), pytest.raises(InputError, match="whose embedding has 64 rows"):
            model(input_ids=torch.tensor(ids))
    with hooks.measuring(model):
        model(torch.tensor([[0, 63]]))
        model(inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(IndexError):
        model(torch.tensor([[1, 64]]))  # nothing is left behind


@pytest.mark.parametrize("positions", ["many", 0, -5, 2.5, True])
def test_positions_that_are_no_number_of_tokens(tokenizer, positions):
    model = toys.make("llama")
    vars(model.config)["max_position_embeddings"] = positions
    with pytest.raises(ArchitectureError, match="says max_position_embeddings = .*; expected a number of tokens"):
        Subject.of(model, tokenizer)


def test_a_model_that_does_not_run_is_said(tokenizer):
    model = toys.make("llama")
    vars(model.model.layers[0].input_layernorm)["variance_epsilon"] = "small"
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM does not run on a few tokens: .* Check its config"):
        Subject.of(model, tokenizer)
