"""Edits at work: which tokens of a call, by which factors, for which calls; one at a time, and nothing left behind."""

import gc
import warnings
import weakref

import pytest
import torch

import toys
from masked import ME, ROWS, TEXT, mask_of, model_of, n_hooks, padded
from melayer.errors import InputError, MelayerWarning
from melayer.interventions.apply import MaskAtWork, Masking
from melayer.interventions.at_work import AtWork, applied, put_on, require_unmasked, take_off
from melayer.model import hooks, wiring

LAYER = 5


def masking_of(decoder, **changes):
    """Block 5 with the first dimension halved and the second gone, in the first token of each sequence."""
    keep = torch.ones(toys.D_MODEL)
    keep[:2] = torch.tensor([0.5, 0.0])
    values = {
        "layers": (LAYER,), "keeps": {LAYER: keep}, "count": 2, "largest": True, "strength": 1.0,
        "target": "first", "me_layer": None, "massive_above": None,
    }  # fmt: skip
    return Masking(**{**values, **changes})


def under(decoder, masking, when=None):
    """The mask at work inside the context."""
    return applied(decoder, MaskAtWork(mask_of(), masking, when))


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
    with under(decoder, masking_of(decoder)):
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
        with under(decoder, masking):
            masked = attn_in(model, torch.tensor([TEXT]))
        expected = plain.clone()
        expected[0, 0, plain[0, 0].abs().argsort(descending=largest)[:7]] *= 0.25
        assert torch.equal(masked, expected)


def test_massive_tokens_are_recognised_in_the_same_pass(model, decoder):
    row = torch.tensor([[9, 8, toys.X, 10, toys.X, 11]])
    masking = masking_of(decoder, target="massive", me_layer=ME, massive_above=1000.0)
    plain = attn_in(model, row)
    with under(decoder, masking):
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
    with under(decoder, masking_of(decoder)):
        found = attn_in(model, torch.tensor([TEXT[4:6]]), **options)
    assert found[0, :, 1].all()  # nothing was set to 0


def test_embeddings_are_tokens_too(model, decoder):
    ids = torch.tensor([TEXT])
    with under(decoder, masking_of(decoder)):
        assert torch.equal(
            attn_in(model, inputs_embeds=model.get_input_embeddings()(ids)), attn_in(model, input_ids=ids)
        )


# --- which calls ---------------------------------------------------------------------------------------------------


def test_calls_for_which_it_is_off_run_plainly(model, decoder):
    ids, on = torch.tensor([TEXT]), []
    plain = attn_in(model, ids)
    with under(decoder, masking_of(decoder), lambda: bool(on)):
        assert torch.equal(attn_in(model, ids), plain)
        on.append(True)
        assert attn_in(model, ids)[0, 0, 1] == 0
        on.clear()
        assert torch.equal(attn_in(model, ids), plain)


def test_a_call_without_tokens_and_a_block_called_outside_of_a_call_are_refused(model, decoder):
    hidden = torch.zeros(1, 3, toys.D_MODEL)
    with under(decoder, masking_of(decoder)):
        with pytest.raises(InputError, match="called without input_ids and inputs_embeds, so nothing can be masked"):
            decoder.stack()
        attn_in(model, torch.tensor([TEXT]))
        rotary = model.model.rotary_emb(hidden, torch.arange(3)[None])
        with pytest.raises(InputError, match="Block 5 was called outside of a call of the model"):
            decoder.blocks[LAYER].module(hidden, position_embeddings=rotary)
    assert n_hooks(model) == 0


def said_in(calls):
    """Our warnings in these calls of the model, one list for each."""
    found = []
    for call in calls:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
        found.append([str(w.message) for w in said if issubclass(w.category, MelayerWarning)])
    return found


def test_a_first_token_that_is_ordinary_is_said_once_whenever_it_comes(model, decoder):
    masking = masking_of(decoder, me_layer=ME, massive_above=1000.0)
    ordinary = torch.tensor([ROWS[2], [toys.X, *ROWS[2][1:]]])
    message = "In 1 of 2 sequences the masked first token is not massive (largest |h| at block 3: "
    for before in (0, 1, 3):
        with under(decoder, masking):
            calls = [lambda: attn_in(model, torch.tensor([TEXT]))] * before + [lambda: attn_in(model, ordinary)] * 3
            said = said_in(calls)
        assert [len(found) for found in said] == [0] * before + [1, 0, 0]
        assert said[before][0].startswith(message)
        assert "needed 1,000). The mask takes from an ordinary token there, which can cost" in said[before][0]


def test_what_melayer_itself_runs_says_nothing_and_uses_nothing_up(model, decoder):
    masking = masking_of(decoder, me_layer=ME, massive_above=1000.0)
    with under(decoder, masking):
        # The probe's first token is ordinary.
        assert said_in([lambda: wiring.read(model), lambda: attn_in(model, torch.tensor([TEXT]))]) == [[], []]
        assert [len(found) for found in said_in([lambda: attn_in(model, torch.tensor([ROWS[2]]))])] == [1]


def test_a_text_without_massive_tokens_is_said_once(model, decoder):
    masking = masking_of(decoder, target="massive", me_layer=ME, massive_above=1000.0)
    rows = torch.tensor([[9, 8, 7, 10], [9, 8, toys.X, 10]])
    with under(decoder, masking), torch.no_grad():
        cache = model(rows[1:], use_cache=True).past_key_values  # massive: nothing to say
        step = {"use_cache": True, hooks.cache_argument(model): cache}
        calls = [
            lambda: model(rows[:1, :1], use_cache=False),  # one token tells nothing
            lambda: model(rows[:1, :1], **step),  # no beginning
            lambda: model(rows),  # one of them has one
            lambda: model(rows[:1]),
            lambda: model(rows[:1]),
        ]
        said = said_in(calls)
    assert [len(found) for found in said] == [0, 0, 0, 1, 0]
    assert said[3][0].startswith("No token of 1 sequences is massive (largest |h| at block 3: ")
    assert said[3][0].endswith("needed 1,000), so nothing is masked.")


# --- gradient checkpointing ----------------------------------------------------------------------------------------


def test_a_block_that_runs_again_has_the_call_that_it_was_part_of(model, decoder):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    functions = [vars(block)["_gradient_checkpointing_func"] for block in toys.blocks(model)]
    ids, mask = padded("left")
    masking, seen = masking_of(decoder), []
    point = decoder.blocks[LAYER].sites["attn_in"]
    with under(decoder, masking), hooks.watch([(0, point)], lambda _, x: seen.append(x.detach().clone())):
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
    with under(decoder, masking_of(decoder)):
        model(torch.tensor([TEXT]), use_cache=False)
        model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model(torch.tensor([TEXT]), use_cache=False).logits.sum().backward()


# --- one at a time, and nothing left behind ------------------------------------------------------------------------


def idle(edit="an edit"):
    """An edit that changes nothing."""
    at_work = AtWork(edit)
    at_work.registrations = lambda decoder: []
    return at_work


def test_only_one_edit_at_a_time(model, decoder):
    other = model_of("llama")
    assert require_unmasked(decoder) is decoder
    assert require_unmasked(model).blocks[0].module is decoder.blocks[0].module
    with pytest.raises(ZeroDivisionError), applied(decoder, idle()):
        for again in (model, decoder):
            with pytest.raises(InputError, match="A mask or a comparator is applied to this model already"):
                require_unmasked(again)
        with pytest.raises(InputError, match="applied to this model already, by another thread"):
            put_on(decoder, idle())
        require_unmasked(other)
        _ = 1 / 0
    require_unmasked(decoder)


def test_generate_does_not_compile_meanwhile(model, decoder):
    for before in (None, True, False):
        model.generation_config.disable_compile = before
        with applied(decoder, idle()):
            assert model.generation_config.disable_compile is True
        assert model.generation_config.disable_compile is before


def test_a_compiled_model_is_refused_before_it_is_read(model, decoder):
    model.compile()
    for given in (model, decoder):
        with pytest.raises(InputError, match="The model is compiled, and compiled code does not see hooks"):
            require_unmasked(given)


def test_hooks_are_gone_after_an_exception(model, decoder):
    with pytest.raises(IndexError), under(decoder, masking_of(decoder)):
        assert n_hooks(model) > 0
        model(torch.tensor([[toys.VOCAB + 9]]))
    assert n_hooks(model) == 0
    assert hooks.at_hand() is None


def test_a_call_that_was_interrupted_leaves_nothing_to_the_next(model, decoder):
    plain = attn_in(model, torch.tensor([TEXT]))

    def interrupt(*_):
        raise KeyboardInterrupt

    with under(decoder, masking_of(decoder)):
        handle = toys.blocks(model)[LAYER + 1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([TEXT]))
        handle.remove()
        ids, mask = padded("left")
        attn_in(model, ids, attention_mask=mask)
        assert hooks.at_hand() is None
    assert torch.equal(attn_in(model, torch.tensor([TEXT])), plain)


def test_for_good_until_it_is_taken_off(model, decoder):
    ids = torch.tensor([TEXT])
    plain, before = attn_in(model, ids), [dict(vars(module)) for module in model.modules()]
    at_work = MaskAtWork(mask_of(), masking_of(decoder))
    put_on(decoder, at_work)
    assert attn_in(model, ids)[0, 0, 1] == 0
    take_off(model, at_work)
    assert torch.equal(attn_in(model, ids), plain)
    assert n_hooks(model) == 0
    assert [dict(vars(module)) for module in model.modules()] == before


def test_blocks_that_left_the_model_meanwhile_are_freed_too(model, decoder):
    blocks = model.model.layers
    with under(decoder, masking_of(decoder)):
        model.model.layers = blocks[:LAYER]
    model.model.layers = blocks
    assert n_hooks(model) == 0
    require_unmasked(model)


def test_a_model_is_not_kept_alive_by_what_was_applied_to_it():
    model = model_of("llama")
    alive = weakref.ref(model)
    decoder = wiring.read(model)
    put_on(decoder, MaskAtWork(mask_of(), masking_of(decoder)))
    model(torch.tensor([TEXT]))
    del model, decoder
    gc.collect()
    assert alive() is None
