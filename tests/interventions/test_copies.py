"""A model under an edit that is copied, pickled, wrapped or saved: masked or not, but never twice and never unsaid."""

import copy
import io
import json
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import melayer
import toys
from masked import ME, TEXT, logits, mask_of, model_of, n_hooks
from melayer.errors import ArchitectureError, InputError, MelayerWarning
from melayer.interventions import card
from melayer.interventions.comparators import CapWrite, FlatGamma, RemoveNeurons, SetMassive
from melayer.interventions.mask import WeMask
from melayer.loading.source import MASK_FILE

MASKS = {
    "weight": WeMask(rate=0.5, me_layer=ME),
    "activation": mask_of(selector="activation"),
    "massive": mask_of(positions="massive", massive_above=1000.0),
    "half strength": mask_of(strength=0.5),
}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": stored}


@contextmanager
def attached(mask, model):
    mask.attach(model)
    try:
        yield
    finally:
        WeMask.detach(model)


WAYS = {"attached": attached, "with": lambda mask, model: mask.apply(model)}


def refused_twice(model):
    with pytest.raises(InputError, match="A mask or a comparator is applied to this model already"):
        mask_of().attach(model)
    with pytest.raises(InputError, match="is applied to this model already"), FlatGamma(ME).apply(model):
        pass


@pytest.mark.parametrize("of", MASKS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_masked_once_and_comes_off(copied, way, of):
    model, mask = model_of("llama"), MASKS[of]
    plain, masked = logits(model, TEXT), logits(model, TEXT, mask)
    assert not torch.equal(plain, masked)
    with WAYS[way](mask, model):
        other = COPIES[copied](model)
        refused_twice(other)
        assert torch.equal(logits(other, TEXT), masked)
        again = COPIES[copied](other)
    # What became of the one is nothing to the other.
    assert torch.equal(logits(model, TEXT), plain)
    assert torch.equal(logits(other, TEXT), masked)
    for one in (other, again):
        assert WeMask.applied_to(one) == mask
        refused_twice(one)
        WeMask.detach(one)
        assert WeMask.applied_to(one) is None
        assert torch.equal(logits(one, TEXT), plain)
        assert n_hooks(one) == 0
        assert torch.equal(logits(one, TEXT, mask), masked)
        with pytest.raises(InputError, match="No mask is attached to this model"):
            WeMask.detach(one)


def test_a_copy_is_masked_by_itself_while_the_other_runs():
    model, mask = model_of("llama"), mask_of()
    expected = logits(model, [TEXT[1:], TEXT[1:]], mask), logits(model, TEXT, mask)
    mask.attach(model)
    other, seen = copy.deepcopy(model), []
    handle = toys.blocks(model)[5].register_forward_pre_hook(lambda *_: seen.append(logits(other, TEXT)))
    assert torch.equal(logits(model, [TEXT[1:], TEXT[1:]]), expected[0])
    handle.remove()
    assert torch.equal(seen[0], expected[1])


def test_a_copy_that_shares_its_modules_has_the_same_mask():
    model, mask = model_of("llama"), mask_of()
    plain, masked = logits(model, TEXT), logits(model, TEXT, mask)
    mask.attach(model)
    shallow = copy.copy(model)
    refused_twice(shallow)
    assert torch.equal(logits(shallow, TEXT), masked)
    WeMask.detach(shallow)
    for one in (model, shallow):
        assert torch.equal(logits(one, TEXT), plain)
        with pytest.raises(InputError, match="No mask is attached"):
            WeMask.detach(one)
    with mask.apply(shallow):
        refused_twice(model)
        with pytest.raises(InputError, match="No mask is attached to this model. One applied by `with` ends with its"):
            WeMask.detach(model)


COMPARATORS = {
    "SetMassive": SetMassive(ME, 1000.0, ((7, 0.0),)),
    "FlatGamma": FlatGamma(ME),
    "CapWrite": CapWrite(ME, 1.0),
    "RemoveNeurons": RemoveNeurons(ME, (5, 12)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("of", COMPARATORS)
def test_a_copy_under_a_comparator_is_under_it_and_comes_off(of, copied):
    model, comparator = model_of("llama"), COMPARATORS[of]
    with torch.no_grad():  # a gamma to flatten
        toys.blocks(model)[ME].post_attention_layernorm.weight.add_(torch.linspace(-0.5, 0.5, toys.D_MODEL))
    plain = logits(model, TEXT)
    with comparator.apply(model):
        edited = logits(model, TEXT)
        other = COPIES[copied](model)
    assert not torch.equal(edited, plain)
    assert torch.equal(logits(other, TEXT), edited)
    refused_twice(other)
    WeMask.detach(other)
    assert torch.equal(logits(other, TEXT), plain)
    assert n_hooks(other) == n_hooks(model) == 0


def test_a_block_that_is_copied_alone_does_not_take_the_model_along():
    model = model_of("llama")
    size = len(pickle.dumps(toys.blocks(model)[5]))
    mask_of().attach(model)
    block = toys.blocks(model)[5]
    assert len(pickle.dumps(block)) < 1.5 * size
    hidden = torch.zeros(1, 3, toys.D_MODEL)
    rotary = model.model.rotary_emb(hidden, torch.arange(3)[None])
    with pytest.raises(InputError, match="Block 5 was called outside of a call of the model"):
        copy.deepcopy(block)(hidden, position_embeddings=rotary)


# --- wrappers ------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What somebody puts around a model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model


def test_the_same_modules_in_another_wrapper():
    from peft import LoraConfig, get_peft_model

    model, mask = model_of("llama"), mask_of()
    plain, masked = logits(model, TEXT), logits(model, TEXT, mask)
    mask.attach(model)
    other = toys.make("llama")
    other.model.layers = nn.ModuleList([*other.model.layers[:4], *model.model.layers[4:]])
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for outer in (model.model, wrapped, wrapped.base_model, wrapped.base_model.model, other):
        refused_twice(outer)
    assert torch.equal(logits(wrapped, TEXT), masked)
    WeMask.detach(wrapped)
    assert torch.equal(logits(wrapped, TEXT), plain)
    with mask.apply(wrapped):
        for outer in (model, model.model, wrapped.base_model, other):
            refused_twice(outer)
        assert torch.equal(logits(wrapped, TEXT), masked)
    assert n_hooks(wrapped) == 0
    mask.attach(wrapped)
    refused_twice(model)
    merged = wrapped.merge_and_unload()
    assert torch.equal(logits(merged, TEXT), masked)
    WeMask.detach(merged)
    assert torch.equal(logits(merged, TEXT), plain)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper])
def test_a_wrapper_that_is_no_model_is_refused_and_the_model_in_it_is_not(wrap):
    model, mask = model_of("llama"), mask_of()
    masked = logits(model, TEXT, mask)
    with pytest.raises(ArchitectureError, match=f"{wrap.__name__} was given.* give the model inside it"):
        mask.attach(wrap(model))
    mask.attach(model)
    with pytest.raises(InputError, match="is applied to this model already"):
        mask.attach(wrap(model))
    if wrap is nn.DataParallel:
        assert torch.equal(logits(wrap(model), TEXT), masked)
    WeMask.detach(wrap(model))
    assert n_hooks(model) == 0


@pytest.mark.parametrize("given", [None, "demo", 3])
def test_what_is_no_model_at_all_is_refused(given):
    with pytest.raises(ArchitectureError, match="was given, which is no causal language model"):
        mask_of().attach(given)


def test_blocks_that_share_their_attention_are_refused():
    model = model_of("llama")
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([*layers[:6], layers[5], layers[7]])
    with pytest.raises(InputError, match="Blocks 5 and 6 share their attention, so a mask on block 5 would act"):
        mask_of().attach(model)
    assert n_hooks(model) == 0
    mask_of(layers=[4, 7]).attach(model)


@pytest.mark.parametrize(
    ("when", "around"),
    [("before", lambda model: lambda *args, **kwargs: model(*args, **kwargs)), ("inside", lambda model: model)],
    ids=["a function, before", "the model, inside"],
)
def test_compiled_code_is_masked_or_refused(when, around):
    model, mask = model_of("llama"), mask_of(rate=1.0)
    ids = torch.tensor([TEXT])
    plain, masked = logits(model, TEXT), logits(model, TEXT, mask)
    compiled = torch.compile(around(model), backend="eager")

    def run():
        with torch.no_grad():
            return compiled(ids, use_cache=False).logits

    if when == "before":
        torch.testing.assert_close(run(), plain, atol=1e-4, rtol=1e-4)
    with mask.apply(model):
        try:
            torch.testing.assert_close(run(), masked, atol=1e-4, rtol=1e-4)
        except InputError as error:
            refused = str(error)
            assert refused.startswith("WeMask did not act in this call: the blocks run as compiled code")
    torch.testing.assert_close(run(), plain, atol=1e-4, rtol=1e-4)
    assert (masked - plain).abs().max() > 1e-2


# --- what is saved -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A directory with a model, its tokenizer and a mask."""
    model = model_of("llama")
    located = melayer.locate(model, toys.tokenizer(), texts=[toys.text(20, x_at=0)])
    model.save_pretrained(tmp_path / "first")
    toys.tokenizer().save_pretrained(tmp_path / "first")
    WeMask.from_located(located, rate=0.3).save(tmp_path / "first")
    return tmp_path / "first"


def loaded(directory):
    with pytest.warns(MelayerWarning, match="is applied"):
        return melayer.load(str(directory))


def test_a_loaded_mask_is_saved_with_the_model(saved, tmp_path):
    model, tokenizer, mask = loaded(saved)
    expected = logits(model, TEXT)
    for one, name in ((model, "a"), (copy.deepcopy(model), "b"), (copy.copy(model), "c")):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        again = loaded(tmp_path / name)
        assert again.mask == mask
        assert torch.equal(logits(again.model, TEXT), expected)
    WeMask.detach(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / MASK_FILE).exists()
    assert "save_pretrained" not in vars(model)


def test_a_mask_is_saved_as_it_was_at_work_when_the_weights_have_changed(saved, tmp_path):
    model, tokenizer, mask = loaded(saved)
    chosen = mask.selected(melayer.load(str(saved), mask=False).model)
    with torch.no_grad():
        for block in toys.blocks(model):
            block.input_layernorm.weight.copy_(block.input_layernorm.weight.flip(0))
    expected = logits(model, TEXT)
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = melayer.load(str(tmp_path / "b"))
    assert [str(w.message)[:20] for w in said if issubclass(w.category, MelayerWarning)] == ["The mask saved with "]
    assert again.mask.selected(again.model) == chosen
    assert torch.equal(logits(again.model, TEXT), expected)


def test_inside_a_context_too_unless_told_otherwise(tmp_path):
    model = model_of("llama")
    for name, options in (("a", {}), ("b", {"saved": False})):
        with mask_of().apply(model, **options):
            model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-after")
    assert WeMask.load(tmp_path / "a") == mask_of()
    assert [path.name for path in tmp_path.glob(f"*/{MASK_FILE}")] == [MASK_FILE]
    with mask_of().apply(model):
        model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c" / MASK_FILE).exists()


def test_what_goes_to_the_hub_has_the_mask(saved, monkeypatch, tmp_path):
    from transformers import PreTrainedModel
    from transformers.utils import hub

    model, _, mask = loaded(saved)
    uploaded = []

    def upload(self, working_dir, repo_id, *_, **__):
        uploaded.append(WeMask.load(working_dir))

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            pass

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    for module in (hub, __import__("transformers").modeling_utils):
        monkeypatch.setattr(module, "hf_api", Api)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: Card())
    model.push_to_hub("me/it")
    model.save_pretrained(tmp_path / "it", push_to_hub=True, repo_id="me/it")
    assert uploaded == [mask, mask]
    assert "_upload_modified_files" not in vars(model)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda self, save_directory, push_to_hub=False: None)
    with pytest.warns(MelayerWarning, match="The weights went to the hub without the edit that is at work"):
        model.save_pretrained(tmp_path / "it", push_to_hub=True)


def test_a_wrapper_that_saves_without_the_mask_is_told(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _, mask = loaded(saved)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.state_dict()  # no saving
    with pytest.warns(MelayerWarning, match="The WeMask at work on this model is not in what is saved here"):
        wrapped.save_pretrained(tmp_path / "adapter")
    WeMask.applied_to(wrapped).save(tmp_path / "adapter")  # the advice
    assert WeMask.load(tmp_path / "adapter") == mask
    WeMask.detach(wrapped)
    wrapped.save_pretrained(tmp_path / "plain")
    mask = WeMask.load(saved)
    mask.attach(wrapped)
    wrapped.save_pretrained(tmp_path / "both")
    assert WeMask.load(tmp_path / "both").dims == mask.dims


def test_a_comparator_that_is_not_saved_is_said(tmp_path):
    model = model_of("llama")
    with (
        FlatGamma(ME).apply(model),
        pytest.warns(MelayerWarning, match="FlatGamma is at work on this model, and is not"),
    ):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / MASK_FILE).exists()


# --- the card ------------------------------------------------------------------------------------------------------


def test_weights_with_a_mask_have_a_card_unless_there_is_one(saved, tmp_path):
    text = (saved / card.CARD).read_text()
    assert "`AutoModelForCausalLM.from_pretrained` loads the weights without the mask" in text
    assert "melayer.load(" in text
    mask_of(rate=0.25).save(saved)
    assert "random 0.25" in (saved / card.CARD).read_text()  # ours is written again
    (saved / card.CARD).write_text("# Mine\n")
    mask_of().save(saved)
    assert (saved / card.CARD).read_text() == "# Mine\n"
    mask_of().save(tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == [MASK_FILE]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    mask_of().save(tmp_path / "adapter")
    assert "`PeftModel.from_pretrained` loads" in (tmp_path / "adapter" / card.CARD).read_text()


def test_the_card_tells_the_truth(saved):
    """What it says of transformers' own loading, and its advice."""
    from transformers import AutoModelForCausalLM

    model, mask = loaded(saved).model, WeMask.load(saved)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    expected = logits(model, TEXT)
    assert not torch.equal(logits(plain, TEXT), expected)
    WeMask.load(saved).attach(plain)
    assert torch.equal(logits(plain, TEXT), expected)
    assert json.loads((saved / MASK_FILE).read_text())["rate"] == mask.rate
