"""Edits at work: which tokens of a call, by which factors, for which calls; one at a time, and nothing left behind."""

import copy
import gc
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch

import toys
from masked import ME, ROWS, TEXT, model_of, n_hooks, padded
from melayer.errors import InputError, MelayerWarning
from melayer.interventions.apply import MaskHooks, Masking, attach, detach, exclusive, require_unmasked
from melayer.model import hooks, wiring

LAYER = 5


def masking_of(decoder, **changes):
    """Block 5 with the first dimension halved and the second gone, in the first token of each sequence."""
    keep = torch.ones(toys.D_MODEL)
    keep[:2] = torch.tensor([0.5, 0.0])
    values = {
        "blocks": {LAYER: decoder.blocks[LAYER]}, "keeps": {LAYER: keep}, "count": 2, "largest": True, "strength": 1.0,
        "target": "first", "me_layer": None, "massive_above": None,
    }  # fmt: skip
    return Masking(**{**values, **changes})


def attn_in(model, *args, **kwargs):
    """What attention reads in block 5 in one call of the model."""
    seen = []
    point = wiring.read(model).blocks[LAYER].sites["attn_in"]
    with torch.no_grad(), hooks.watch([(0, point)], lambda _, x: seen.append(x.clone())):
        model(*args, **kwargs)
    (found,) = seen
    return found


@pytest.fixture
def model():
    return model_of("llama")


@pytest.fixture
def decoder(model):
    return wiring.read(model)


# --- which tokens, by which factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_first_token_of_each_row_is_scaled_and_no_other(model, decoder, side):
    ids, mask = padded(side)
    plain = attn_in(model, ids, attention_mask=mask)
    with MaskHooks(masking_of(decoder), decoder).hooked():
        masked = attn_in(model, ids, attention_mask=mask)
    expected = plain.clone()
    for row, first in enumerate(mask.argmax(dim=1).tolist()):
        expected[row, first, :2] *= torch.tensor([0.5, 0.0])
    assert torch.equal(masked, expected)
    assert not torch.equal(masked, plain)


def test_factors_chosen_by_token_are_those_of_its_own_largest_entries(model, decoder):
    plain = attn_in(model, torch.tensor([TEXT]))
    for largest in (True, False):
        masking = masking_of(decoder, keeps={}, count=7, largest=largest, strength=0.75)
        with MaskHooks(masking, decoder).hooked():
            masked = attn_in(model, torch.tensor([TEXT]))
        expected = plain.clone()
        expected[0, 0, plain[0, 0].abs().argsort(descending=largest)[:7]] *= 0.25
        assert torch.equal(masked, expected)


def test_massive_tokens_are_recognised_in_the_same_pass(model, decoder):
    row = torch.tensor([[9, 8, toys.X, 10, toys.X, 11]])
    masking = masking_of(decoder, target="massive", me_layer=ME, massive_above=1000.0)
    plain = attn_in(model, row)
    with MaskHooks(masking, decoder).hooked():
        masked = attn_in(model, row)
        padding = attn_in(model, row, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    assert (masked != plain)[0].any(dim=1).nonzero().flatten().tolist() == [2, 4]
    assert torch.equal(masked[0, [2, 4], :2], plain[0, [2, 4], :2] * torch.tensor([0.5, 0.0]))
    assert padding[0, 2, 1] == 0  # masked
    assert padding[0, 4, 1] != 0  # massive, and padding


def test_a_call_that_goes_on_from_a_cache_has_no_first_token(model, decoder):
    with torch.no_grad():
        cache = model(torch.tensor([TEXT[:4]]), use_cache=True).past_key_values
    options = {"use_cache": True, hooks.cache_argument(model): cache}
    with MaskHooks(masking_of(decoder), decoder).hooked():
        found = attn_in(model, torch.tensor([TEXT[4:6]]), **options)
    assert found[0, :, 1].all()  # nothing was set to 0


def test_embeddings_are_tokens_too(model, decoder):
    ids = torch.tensor([TEXT])
    with MaskHooks(masking_of(decoder), decoder).hooked():
        assert torch.equal(
            attn_in(model, inputs_embeds=model.get_input_embeddings()(ids)), attn_in(model, input_ids=ids)
        )


# --- which calls ---------------------------------------------------------------------------------------------------


def test_calls_for_which_it_is_off_run_plainly(model, decoder):
    ids, on = torch.tensor([TEXT]), []
    plain = attn_in(model, ids)
    with MaskHooks(masking_of(decoder), decoder, lambda: bool(on)).hooked():
        assert torch.equal(attn_in(model, ids), plain)
        on.append(True)
        assert attn_in(model, ids)[0, 0, 1] == 0
        on.clear()
        assert torch.equal(attn_in(model, ids), plain)


def test_a_call_without_tokens_and_a_block_called_outside_of_a_call_are_refused(model, decoder):
    hidden = torch.zeros(1, 3, toys.D_MODEL)
    with MaskHooks(masking_of(decoder), decoder).hooked():
        with pytest.raises(InputError, match="called without input_ids and inputs_embeds, so nothing can be masked"):
            decoder.stack()
        attn_in(model, torch.tensor([TEXT]))
        rotary = model.model.rotary_emb(hidden, torch.arange(3)[None])
        with pytest.raises(InputError, match=r"Block 5 was called with \(1, 3\) tokens outside of a call of the model"):
            decoder.blocks[LAYER].module(hidden, position_embeddings=rotary)
    assert n_hooks(model) == 0


def test_a_first_token_that_is_ordinary_is_said_once(model, decoder):
    masking = masking_of(decoder, me_layer=ME, massive_above=1000.0)
    with warnings.catch_warnings(record=True) as said, MaskHooks(masking, decoder).hooked():
        warnings.simplefilter("always")
        attn_in(model, torch.tensor([TEXT]))  # massive
        attn_in(model, torch.tensor([ROWS[2], [toys.X, *ROWS[2][1:]]]))
    # The first call used up what is said: once, whatever it finds.
    assert [w for w in said if issubclass(w.category, MelayerWarning)] == []
    message = "In 1 of 2 sequences the masked first token is not massive .*needed 1,000"
    with pytest.warns(MelayerWarning, match=message), MaskHooks(masking, decoder).hooked():
        attn_in(model, torch.tensor([ROWS[2], [toys.X, *ROWS[2][1:]]]))


# --- gradient checkpointing ----------------------------------------------------------------------------------------


def test_a_block_that_runs_again_has_the_call_that_it_was_part_of(model, decoder):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    functions = [vars(block)["_gradient_checkpointing_func"] for block in toys.blocks(model)]
    ids, mask = padded("left")
    masking, seen = masking_of(decoder), []
    point = decoder.blocks[LAYER].sites["attn_in"]
    with MaskHooks(masking, decoder).hooked(), hooks.watch([(0, point)], lambda _, x: seen.append(x.detach().clone())):
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        model(torch.tensor([TEXT]), use_cache=False)  # another call, with other first tokens, before the backward pass
        loss.backward()
    first, other, again = seen
    assert torch.equal(first, again)
    assert first.shape != other.shape
    assert [first[row, at, 1].item() for row, at in enumerate(mask.argmax(dim=1))] == [0, 0, 0]
    assert [vars(block)["_gradient_checkpointing_func"] for block in toys.blocks(model)] == functions


def test_checkpointing_that_is_turned_off_inside_stays_off(model, decoder):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with MaskHooks(masking_of(decoder), decoder).hooked():
        model(torch.tensor([TEXT]), use_cache=False)
        model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model(torch.tensor([TEXT]), use_cache=False).logits.sum().backward()


# --- one at a time, and nothing left behind ------------------------------------------------------------------------


def test_only_one_edit_at_a_time(model, decoder):
    other = model_of("llama")
    assert require_unmasked(decoder) is decoder
    assert require_unmasked(model).blocks[0].module is decoder.blocks[0].module
    with pytest.raises(ZeroDivisionError), exclusive(decoder):
        for again in (model, decoder):
            with pytest.raises(InputError, match="A mask or a comparator is applied to this model already"):
                require_unmasked(again)
        require_unmasked(other)
        _ = 1 / 0
    require_unmasked(decoder)


def test_generate_does_not_compile_meanwhile(model, decoder):
    for before in (None, True, False):
        model.generation_config.disable_compile = before
        with exclusive(decoder):
            assert model.generation_config.disable_compile is True
        assert model.generation_config.disable_compile is before


def test_a_compiled_model_is_refused_before_it_is_read(model, decoder):
    model.compile()
    for given in (model, decoder):
        with pytest.raises(InputError, match="The model is compiled, and compiled code does not see hooks"):
            require_unmasked(given)


def test_hooks_are_gone_after_an_exception(model, decoder):
    with pytest.raises(IndexError), MaskHooks(masking_of(decoder), decoder).hooked():
        assert n_hooks(model) > 0
        model(torch.tensor([[toys.VOCAB + 9]]))
    assert n_hooks(model) == 0


def test_attached_for_good_until_it_is_detached(model, decoder):
    ids = torch.tensor([TEXT])
    plain = attn_in(model, ids)
    assert not detach(model)
    attach(model, MaskHooks(masking_of(decoder), decoder).hooked())
    masked = attn_in(model, ids)
    assert masked[0, 0, 1] == 0
    copied = copy.deepcopy(model)
    assert detach(model)
    assert not detach(model)
    assert torch.equal(attn_in(model, ids), plain)
    assert n_hooks(model) == 0
    # The copy is masked by hooks of its own, and there is no context that could take them off.
    assert torch.equal(attn_in(copied, ids), masked)
    assert not detach(copied)


@contextmanager
def applied(model):
    decoder = require_unmasked(model)
    with exclusive(decoder), MaskHooks(masking_of(decoder), decoder).hooked():
        yield


def test_a_model_is_not_kept_alive_by_what_was_applied_to_it():
    model = model_of("llama")
    alive = weakref.ref(model)
    attach(model, applied(model))
    del model
    gc.collect()
    assert alive() is None
