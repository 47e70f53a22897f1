"""Gradients of a call under an edit are its own, whenever the backward pass comes; or they are refused."""

import copy
import threading
import warnings
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import toys
from masked import ME, TEXT, logits, mask_of, model_of, n_hooks, padded
from melayer.errors import InputError
from melayer.interventions.comparators import CapWrite, FlatGamma, RemoveNeurons, SetMassive
from melayer.interventions.mask import WeMask
from melayer.model import wiring
from melayer.model.attention import watch_heads

OTHER = torch.tensor([TEXT[1:9], TEXT[3:11]])
WAYS = {"none": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
EDITS = {
    "first": mask_of(),
    "half": mask_of(strength=0.5),
    "weight": WeMask(rate=0.5, me_layer=ME),
    "activation": mask_of(selector="activation"),
    "massive": mask_of(positions="massive", massive_above=1000.0),
    "SetMassive": SetMassive(ME, 1000.0, ((7, 0.0),)),
    "FlatGamma": FlatGamma(ME),
    "CapWrite": CapWrite(ME, 1.0),
    "RemoveNeurons": RemoveNeurons(ME, (5, 12)),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _ordinary_tokens_are_no_matter_here(_own_warnings_are_errors):
    for message in ("In . of . sequences the masked first token", "No token of . sequences is massive"):
        warnings.filterwarnings("ignore", message=message)


def trained(way):
    """A toy in training mode, checkpointed in this way."""
    model = model_of("llama")
    with torch.no_grad():  # a gamma to flatten
        toys.blocks(model)[ME].post_attention_layernorm.weight.add_(torch.linspace(-0.5, 0.5, toys.D_MODEL))
    model.train()
    if WAYS[way] is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=WAYS[way])
        model.enable_input_require_grads()
    return model


def loss_of(model, ids, attention_mask=None):
    return model(ids, attention_mask=attention_mask, labels=ids, use_cache=False).loss


def taken(model):
    """The gradients, which are then forgotten."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def differ(found, other):
    return any(not torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in other.items())


@pytest.mark.parametrize("of", EDITS)
@pytest.mark.parametrize("way", WAYS)
def test_after_the_context_is_inside_it(way, of):
    model, edit = trained(way), EDITS[of]
    ids, attention_mask = padded("left")
    loss_of(model, ids, attention_mask).backward()
    plain = taken(model)
    with edit.apply(model):
        loss_of(model, ids, attention_mask).backward()
    inside = taken(model)
    with edit.apply(model):
        loss = loss_of(model, ids, attention_mask)
    loss.backward()
    same(taken(model), inside)
    assert differ(inside, plain)
    assert n_hooks(model) == n_hooks(trained(way))
    loss_of(model, ids, attention_mask).backward()
    same(taken(model), plain)


@pytest.mark.parametrize("way", WAYS)
def test_after_it_is_detached_and_another_is_put_on(way):
    model = trained(way)
    ids, attention_mask = padded("right")
    with mask_of().apply(model):
        loss_of(model, ids, attention_mask).backward()
    inside = taken(model)
    mask_of().attach(model)
    losses = [loss_of(model, ids, attention_mask) for _ in range(4)]
    WeMask.detach(model)
    losses[0].backward()
    same(taken(model), inside)
    other = mask_of(seed=5, rate=1.0)
    with other.apply(model):
        losses[1].backward()
        same(taken(model), inside)
        # Another call of the other one in between.
        between = loss_of(model, OTHER)
        losses[2].backward()
        same(taken(model), inside)
        between.backward()
        found = taken(model)
        loss_of(model, OTHER).backward()
        same(found, taken(model))
    losses[3].backward()
    same(taken(model), inside)
    assert n_hooks(model) == n_hooks(trained(way))


@pytest.mark.parametrize("way", WAYS)
def test_several_calls_in_flight_and_others_in_between(way):
    """Of different shapes, plain and masked, with generation and a pass without gradients; all backward at the end."""
    model, edit = trained(way), mask_of()
    ids, attention_mask = padded("left")
    calls = [(ids, attention_mask), (OTHER, None), (torch.tensor([TEXT]), None)]
    expected = []
    for masked in (True, False):
        for given in calls:
            with edit.apply(model) if masked else ExitStack():
                loss_of(model, *given).backward()
            expected.append(taken(model))
    losses = []
    with edit.apply(model):
        with torch.no_grad():
            loss_of(model, OTHER)
        losses.append(loss_of(model, *calls[0]))
        with torch.inference_mode():
            model(OTHER)
        losses.append(loss_of(model, *calls[1]))
        model.eval()
        model.generate(OTHER, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.train()
        losses.append(loss_of(model, *calls[2]))
    losses += [loss_of(model, *given) for given in calls]
    with edit.apply(model):  # plain calls stay plain
        for place in (5, 0, 3, 2, 4, 1):
            losses[place].backward()
            same(taken(model), expected[place])
    with edit.apply(model):
        both = loss_of(model, *calls[0]), loss_of(model, *calls[1])
    plain = loss_of(model, *calls[2])
    (both[0] + plain + both[1]).backward()
    for name, found in taken(model).items():
        total = expected[0][name] + expected[1][name] + expected[5][name]
        torch.testing.assert_close(found, total, atol=1e-5 * float(total.abs().max()) + 1e-9, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_after_the_context(way):
    model, edit = trained(way), mask_of()
    ids, attention_mask = padded("left")

    def accumulated(inside):
        losses = []
        with edit.apply(model):
            for given in ((ids, attention_mask), (OTHER, None)):
                losses.append(loss_of(model, *given))
                if inside:
                    losses.pop().backward()
        for loss in losses:
            loss.backward()
        return taken(model)

    same(accumulated(False), accumulated(True))


@pytest.mark.parametrize("way", WAYS)
def test_twice_through_one_graph(way):
    model = trained(way)
    with mask_of().apply(model):
        loss = loss_of(model, OTHER)
        loss.backward(retain_graph=True)
        inside = taken(model)
    loss.backward(retain_graph=True)
    same(taken(model), inside)
    loss.backward()
    same(taken(model), inside)


@pytest.mark.parametrize("way", WAYS)
def test_a_call_for_which_it_is_off_stays_plain(way):
    model, on = trained(way), [True]
    loss_of(model, OTHER).backward()
    plain = taken(model)
    with mask_of().apply(model, when=lambda: bool(on)):
        loss_of(model, OTHER).backward()
        masked = taken(model)
        on.clear()
        off = loss_of(model, OTHER)
        on.append(True)
        with_it = loss_of(model, OTHER)
        on.clear()
        off.backward()
        same(taken(model), plain)
    with_it.backward()
    same(taken(model), masked)
    assert differ(masked, plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_with_somebody_who_watches_the_heads(way, implementation):
    model, seen = trained(way), []
    model.set_attn_implementation(implementation)
    decoder = wiring.read(model)
    with mask_of().apply(decoder), watch_heads(decoder, lambda *_: seen.append(1)):
        if implementation == "eager" and way != "none":
            # Attention is another function outside: what runs again would not be what ran.
            with pytest.raises(InputError, match="Heads cannot be watched under gradient checkpointing where that"):
                loss_of(model, OTHER)
            return
        loss_of(model, OTHER).backward()
        inside = taken(model)
        loss = loss_of(model, OTHER)
    loss.backward()
    same(taken(model), inside)
    assert seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", [False, True])
def test_threads_with_calls_of_their_own(way, after):
    """Each thread's gradients are those that it would have had alone, also when all come after the context."""
    model, edit = trained(way), mask_of()
    ids, attention_mask = padded("left")
    calls = [(ids, attention_mask), (OTHER, None), (torch.tensor([TEXT]), None), (OTHER[:, 2:], None)]
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(loss):
        if way == "reentrant":  # which knows no gradients but those that add up
            return loss.backward()
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    with edit.apply(model):
        expected = []
        for given in calls:
            loss_of(model, *given).backward()
            expected.append(taken(model))
    found, ready, left = {}, threading.Barrier(len(calls) + 1), threading.Event()

    def work(place, given):
        losses = [loss_of(model, *given) for _ in range(3)]
        ready.wait(60)
        if after:
            left.wait(60)
        found[place] = [gradients(loss) for loss in losses]

    threads = [threading.Thread(target=work, args=item) for item in enumerate(calls)]
    with edit.apply(model):
        for thread in threads:
            thread.start()
        ready.wait(60)
        if not after:
            for thread in threads:
                thread.join()
    left.set()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(len(calls)))
    if way == "reentrant":
        total = {name: 3 * sum(of[name] for of in expected) for name in names}
        pairs = [(taken(model), total)]
    else:
        pairs = [(one, expected[place]) for place, of_place in found.items() for one in of_place]
    for one, right in pairs:
        for name, gradient in right.items():
            torch.testing.assert_close(one[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-3)
    assert n_hooks(model) == n_hooks(trained(way))


# --- checkpoints that are not transformers' own ----------------------------------------------------------------------


def wrapped(model, use_reentrant):
    """Every block behind PyTorch's own wrapper, as FSDP's activation checkpointing does it."""
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer",
    )


def by_name(gradients):
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in gradients.items()}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("of", ["first", "massive", "CapWrite"])
def test_blocks_behind_a_wrapper_are_right_or_refused(of, use_reentrant):
    model, edit = trained("none"), EDITS[of]
    model.enable_input_require_grads()
    ids, attention_mask = padded("left")
    with edit.apply(model):
        loss_of(model, ids, attention_mask).backward()
        expected = taken(model)
    loss_of(model, ids, attention_mask).backward()
    plain = taken(model)
    with edit.apply(model):
        wrapped(model, use_reentrant)
        loss_of(model, ids, attention_mask).backward()
        same(by_name(taken(model)), expected)
        # Two calls in one backward pass: which block belongs to which is not known.
        two = loss_of(model, ids, attention_mask) + loss_of(model, OTHER)
        with pytest.raises(InputError, match="which of several calls it is part of is not known. Use model.gradient_"):
            two.backward()
        taken(model)
        for _ in range(2):
            loss_of(model, OTHER)
            loss_of(model, ids, attention_mask).backward()
            same(by_name(taken(model)), expected)
        loss = loss_of(model, ids, attention_mask)
    with pytest.raises(InputError, match="came after it was taken off the model, and its blocks are run again under"):
        loss.backward()
    taken(model)
    loss = loss_of(model, ids, attention_mask)
    loss.backward()
    same(by_name(taken(model)), plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_under_a_checkpoint_as_a_whole_is_right_or_refused(use_reentrant):
    model, edit = trained("none"), mask_of()
    embeds = model.get_input_embeddings()(OTHER).detach().requires_grad_()

    def loss_whole():
        run = lambda x: model(inputs_embeds=x, use_cache=False).logits  # noqa: E731
        return checkpoint(run, embeds, use_reentrant=use_reentrant).square().mean()

    def loss_plain():
        return model(inputs_embeds=embeds, use_cache=False).logits.square().mean()

    loss_plain().backward()
    plain = taken(model)
    with edit.apply(model):
        loss_plain().backward()
        expected = taken(model)
        if not use_reentrant:
            with pytest.raises(InputError, match="The model runs as a whole under torch.utils.checkpoint, which would"):
                loss_whole()
            return
        loss_whole().backward()
        same(taken(model), expected)
        loss = loss_whole()
    with pytest.raises(InputError, match="came after it was taken off the model"):
        loss.backward()
    taken(model)
    loss = loss_whole()
    with edit.apply(model):
        loss.backward()  # a plain call stays plain
    same(taken(model), plain)
    assert differ(expected, plain)


def test_a_copy_made_between_the_passes_has_nothing_of_them():
    model = trained("not reentrant")
    with mask_of().apply(model):
        loss = loss_of(model, OTHER)
        other = copy.deepcopy(model)
        loss.backward()
        inside = taken(model)
    loss_of(other, OTHER).backward()
    same(taken(other), inside)
    WeMask.detach(other)
    assert torch.equal(logits(other, TEXT), logits(model, TEXT))
    assert n_hooks(other) == n_hooks(model)


def test_what_is_kept_for_the_backward_pass_goes_with_it():
    import gc
    import weakref

    model = trained("reentrant")
    with mask_of().apply(model):
        loss = loss_of(model, OTHER)
        block = toys.blocks(model)[5]
        replaying = weakref.ref(vars(block)["_gradient_checkpointing_func"])
    loss.backward()
    del loss
    gc.collect()
    assert replaying() is None
